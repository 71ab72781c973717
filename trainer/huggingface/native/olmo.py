"""OLMo's hybrid of gated delta and softmax layers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...layers.base import Block
from ...layers.linear_design import LinearDesign
from ..naming import layer_parameter
from ..tensor_map import TensorMap
from . import linear_naming
from .base import Mismatches
from .gated_delta import GatedDeltaHybrid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class OlmoHybrid(GatedDeltaHybrid):
    """Norms before the halves of gated delta layers, and behind those of softmax layers, which norm
    their queries and keys over all heads together.
    """

    model_type = "olmo_hybrid"
    qk_norm = "all"

    def mismatches(self) -> Mismatches:
        yield from self.layer_mismatches("pre", self.blocks("gated_deltanet"))
        yield from self.layer_mismatches("reordered", self.blocks("full"))
        yield from self.softmax_mismatches(any_rotary_fraction=True)
        yield from self.delta_mismatches(betas=(1.0, 2.0))
        yield from self.partial_rotary_mismatches()
        if self.model.rms_norm_eps != 1e-5:
            yield f"rms_norm_eps: {self.model.rms_norm_eps:g} (its gated delta layers have 1e-5)"
        yield from self.head_dim_mismatches()

    def config(self) -> dict[str, Any]:
        config = super().config()
        config["linear_allow_neg_eigval"] = self.delta_design.beta == 2.0
        del config["head_dim"]
        if self.softmax_blocks[0].rotary_fraction == 0:
            # Without the key, its config would fill in its own default.
            config["rope_parameters"]["rope_theta"] = None
        return config

    def trained_with(self, config: "PreTrainedConfig", layer: int) -> dict[str, Any]:
        values = super().trained_with(config, layer)
        if not (config.rope_parameters or {}).get("rope_theta"):
            values["rotary_fraction"] = 0.0
        return values

    def norm_maps(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if block.norm != "reordered":
            yield from super().norm_maps(layer, block)
            return
        names = {
            "post_mixer_layernorm": "post_attention_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
        }
        for megatron_name, hf_name in names.items():
            yield layer_parameter(layer, f"{megatron_name}.weight", f"{hf_name}.weight")

    def linear_maps(self, layer: int, design: LinearDesign) -> Iterator[TensorMap]:
        projections = {
            "q_proj": ("q",),
            "k_proj": ("k",),
            "v_proj": ("v",),
            "g_proj": ("gate",),
            "b_proj": ("beta",),
            "a_proj": ("decay",),
        }
        yield from linear_naming.gated_delta(design, layer, projections, "o_norm", "o_proj")
