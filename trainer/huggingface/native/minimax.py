"""MiniMax: lightning and softmax layers, with experts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...layers.base import Block
from ...layers.linear_design import LinearDesign
from ...recipe.schema import MoEConfig
from .. import naming
from ..tensor_map import TensorMap
from . import linear_naming
from .base import Mismatches, NativeTarget

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_FACTORS = {"full": "full_attn", "lightning": "linear_attn"}
"""How its config calls the residual scales of each kind of mixer."""


class MiniMax(NativeTarget):
    """Lightning and softmax layers, each with experts. A dense MLP is a mixture of one expert."""

    model_type = "minimax"
    kinds = {"full": "full_attention", "lightning": "linear_attention"}

    def mismatches(self) -> Mismatches:
        yield from self.layer_mismatches("post", moe=True)
        yield from self.softmax_mismatches()
        if len({block.mlp for block in self.stack}) > 1:
            yield "both dense layers and layers with experts"
        if len({block.mlp_residual for block in self.stack}) > 1:
            yield "layers with different mlp_residual"
        for kind in self.kinds:
            if len({block.mixer_residual for block in self.blocks(kind)}) > 1:
                yield f"{kind} layers with different mixer_residual"
        yield from self._lightning_mismatches()
        if self._moe and (
            self._moe.shared_expert_intermediate_size or not self._moe.norm_topk_prob
        ):
            yield "a shared expert, or norm_topk_prob: false"

    def _lightning_mismatches(self) -> Mismatches:
        model = self.model
        designs = self.designs("lightning")
        for design in designs.values():
            if not _has_its_style(design):
                yield "lightning with another style or without output_gate"
            sizes = (design.heads, design.key_dim, design.value_dim)
            if sizes != (model.num_attention_heads, model.kv_channels, model.kv_channels):
                yield "lightning heads of other sizes than those of the softmax layers"
        if designs and model.rms_norm_eps != 1e-6:
            yield f"rms_norm_eps: {model.rms_norm_eps:g} (its lightning layers have 1e-6)"

    # Its experts

    @property
    def _moe(self) -> MoEConfig | None:
        """The experts of all layers; None for dense MLPs."""
        return self.model.moe if self.stack[0].mlp == "moe" else None

    @property
    def intermediate_size(self) -> int:
        width = self._moe.intermediate_size if self._moe else None
        return width or self.model.intermediate_size

    def _expert_counts(self) -> dict[str, int]:
        if self._moe is None:
            return {"num_local_experts": 1, "num_experts_per_tok": 1}
        return {
            "num_local_experts": self._moe.num_experts,
            "num_experts_per_tok": self._moe.num_experts_per_tok,
        }

    # Its config

    def config(self) -> dict[str, Any]:
        config = super().config() | {
            "layer_types": self.layer_types,
            **self._expert_counts(),
            "router_aux_loss_coef": self._moe.router_aux_loss_coef if self._moe else 0.0,
        }
        for kind, prefix in _FACTORS.items():
            blocks = self.blocks(kind)
            if blocks:
                alpha, beta = blocks[0].mixer_residual
                config |= {f"{prefix}_alpha_factor": alpha, f"{prefix}_beta_factor": beta}
        alpha, beta = self.stack[0].mlp_residual
        return config | {"mlp_alpha_factor": alpha, "mlp_beta_factor": beta}

    def required_sizes(self) -> dict[str, int]:
        return super().required_sizes() | self._expert_counts()

    def trained_with(self, config: "PreTrainedConfig", layer: int) -> dict[str, Any]:
        kind = "full" if config.layer_types[layer] == self.kinds["full"] else "lightning"

        def scales(prefix: str) -> tuple[float, float]:
            alpha = getattr(config, f"{prefix}_alpha_factor")
            return alpha, getattr(config, f"{prefix}_beta_factor")

        return super().trained_with(config, layer) | {
            "mixer_residual": scales(_FACTORS[kind]),
            "mlp_residual": scales("mlp"),
        }

    # Its tensors

    def linear_maps(self, layer: int, design: LinearDesign) -> Iterator[TensorMap]:
        if not _has_its_style(design):
            return
        projections = {"self_attn.qkv_proj": ("qkv",), "self_attn.output_gate": ("gate",)}
        yield linear_naming.by_head(design, layer, projections)
        names = {"norm": "norm", "linear_proj": "out_proj"}
        for megatron_name, hf_name in names.items():
            yield naming.layer_parameter(
                layer, f"mixer.{megatron_name}.weight", f"self_attn.{hf_name}.weight"
            )

    def mlp_maps(self, layer: int, block: Block) -> Iterator[TensorMap]:
        num_experts = self._expert_counts()["num_local_experts"] if block.mlp == "moe" else None
        yield from naming.stacked_experts(layer, num_experts)

    def has_no_effect(self, hf_name: str) -> bool:
        # The router of a single expert.
        return self._moe is None and hf_name.endswith(".mlp.gate.weight")

    def finish(self, hf_model: "PreTrainedModel") -> None:
        """Set the decays of the recipe, and routers for single experts."""
        import torch

        hf_layers = hf_model.model.layers
        for layer, design in self.designs("lightning").items():
            attention = hf_layers[layer].self_attn
            slopes = self._slopes(design, layer, self.model.num_attention_heads)[:, None, None]
            attention.slope_rate = slopes
            attention.query_decay, attention.key_decay, decay = attention.decay_factors(slopes)
            # Its own code lets a head without decay see later tokens of its chunk.
            attention.diagonal_decay = decay.tril()
        for layer, block in enumerate(self.stack):
            if block.mlp != "moe":
                # A single expert's weight is 1, whatever its router says.
                router = torch.zeros(1, self.model.hidden_size)
                hf_layers[layer].mlp.gate.weight = torch.nn.Parameter(router)

    def buffer_problems(self, hf_model: "PreTrainedModel") -> Iterator[str]:
        for layer, design in self.designs("lightning").items():
            hf_slopes = getattr(hf_model.model.layers[layer].self_attn, "slope_rate", None)
            if hf_slopes is None:  # softmax attention in the folder
                continue
            slopes = self._slopes(design, layer, hf_slopes.numel())
            if not slopes.allclose(hf_slopes.float().flatten(), atol=1e-6):
                yield (
                    f"the decays of layer {layer} are not those of decay: {design.decay}; "
                    "choose the decay that the model was trained with"
                )

    def _slopes(self, design: LinearDesign, layer: int, num_heads: int) -> "Tensor":
        """Return how fast each head of a lightning layer decays: fp32 ``[heads]``."""
        from ...layers.decay import FIXED

        return -FIXED[design.decay](num_heads, layer, self.model.num_hidden_layers)


def _has_its_style(design: LinearDesign) -> bool:
    """Return whether a lightning layer is MiniMax's: only these have a sigmoid gate."""
    return design.gate == "sigmoid"
