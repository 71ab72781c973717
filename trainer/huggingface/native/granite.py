"""Granite 4: Mamba-2 and softmax layers."""

from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, Any

from ...layers.base import Block
from ...layers.linear_design import LinearDesign
from ..naming import layer_parameter
from ..tensor_map import TensorMap
from . import linear_naming
from .base import Mismatches, NativeTarget

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GraniteHybrid(NativeTarget):
    """Mamba-2 and softmax layers, with a dense MLP: the shared expert of a model without others."""

    model_type = "granitemoehybrid"
    kinds = {"full": "full_attention", "mamba2": "linear_attention"}

    def mismatches(self) -> Mismatches:
        yield from self.layer_mismatches("pre")
        yield from self.softmax_mismatches(any_rotary_fraction=True)
        yield from self.partial_rotary_mismatches()
        yield from self._mamba_mismatches()
        yield from self.head_dim_mismatches()

    def _mamba_mismatches(self) -> Mismatches:
        designs = set(self.designs("mamba2").values())
        if not designs:
            yield "a stack without mamba2 layers"
        if len(designs) > 1:
            yield "mamba2 layers of different sizes"
        for design in designs:
            if design.width % self.model.hidden_size:
                yield f"a mamba2 width of {design.width}, which is not a multiple of hidden_size"
            if not design.conv_kernel:
                yield "conv_kernel: 0"

    def config(self) -> dict[str, Any]:
        design = next(iter(self.designs("mamba2").values()))
        softmax_blocks = self.softmax_blocks
        is_rotary = bool(softmax_blocks) and softmax_blocks[0].rotary_fraction > 0
        config = super().config() | {
            "layer_types": self.layer_types,
            "attention_multiplier": self._attention_multiplier,
            "position_embedding_type": "rope" if is_rotary else None,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": self.model.intermediate_size,
            "mamba_n_heads": design.heads,
            "mamba_n_groups": design.key_heads,
            "mamba_d_state": design.key_dim,
            "mamba_d_head": design.value_dim,
            "mamba_d_conv": design.conv_kernel,
            "mamba_expand": design.width // self.model.hidden_size,
        }
        del config["head_dim"]
        return config

    @property
    def _attention_multiplier(self) -> float:
        return self.model.kv_channels**-0.5

    def fixed_values(self) -> dict[str, Any]:
        return {
            "embedding_multiplier": 1.0,
            "attention_multiplier": self._attention_multiplier,
            "logits_scaling": 1.0,
            "time_step_limit": (0.0, inf),
        }

    def trained_with(self, config: "PreTrainedConfig", layer: int) -> dict[str, Any]:
        values = super().trained_with(config, layer)
        if config.position_embedding_type != "rope":
            values["rotary_fraction"] = 0.0
        residual = (1.0, config.residual_multiplier)
        return values | {"mixer_residual": residual, "mlp_residual": residual}

    def linear_maps(self, layer: int, design: LinearDesign) -> Iterator[TensorMap]:
        yield from linear_naming.mamba2(design, layer)

    def mlp_maps(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if block.mlp == "dense":
            names = {"linear_fc1": "input_linear", "linear_fc2": "output_linear"}
            for megatron_name, hf_name in names.items():
                yield layer_parameter(
                    layer, f"mlp.{megatron_name}.weight", f"shared_mlp.{hf_name}.weight"
                )
