"""Qwen3 and Qwen3.5."""

from collections.abc import Iterator
from typing import Any

from ...layers.linear_design import LinearDesign
from ..tensor_map import TensorMap
from . import linear_naming
from .base import Mismatches
from .gated_delta import GatedDeltaHybrid
from .llama import LlamaLike


class Qwen3(LlamaLike):
    """Norms of queries and keys; full attention and windows."""

    model_type = "qwen3"
    kinds = {"full": "full_attention", "window": "sliding_attention"}
    qk_norm = True

    def config(self) -> dict[str, Any]:
        config = super().config()
        if self.windows:
            config |= {"use_sliding_window": True, "sliding_window": self.windows[0]}
        return config | {"layer_types": self.layer_types}


class Qwen35(GatedDeltaHybrid):
    """Dense Qwen3.5: norms that multiply by one plus their weight, and softmax layers with an
    output gate and partial rotary positions.
    """

    model_type = "qwen3_5_text"
    qk_norm = True
    output_gate = True
    norm_offset = -1.0

    def mismatches(self) -> Mismatches:
        yield from self.layer_mismatches("pre")
        yield from self.softmax_mismatches(any_rotary_fraction=True)
        yield from self.delta_mismatches(betas=(1.0,))
        if any(block.rotary_fraction == 0 for block in self.softmax_blocks):
            yield "rotary_fraction: 0"

    def config(self) -> dict[str, Any]:
        config = super().config()
        rotary_fraction = self.softmax_blocks[0].rotary_fraction
        config["rope_parameters"]["partial_rotary_factor"] = rotary_fraction
        return config

    def linear_maps(self, layer: int, design: LinearDesign) -> Iterator[TensorMap]:
        projections = {
            "in_proj_qkv": ("q", "k", "v"),
            "in_proj_z": ("gate",),
            "in_proj_b": ("beta",),
            "in_proj_a": ("decay",),
        }
        yield from linear_naming.gated_delta(design, layer, projections, "norm", "out_proj")
