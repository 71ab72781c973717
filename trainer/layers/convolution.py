"""A layer whose mixer is a gated short convolution. Without torch."""

from typing import Any, Literal

import numpy as np

from .base import (
    Block,
    ContextSplit,
    MixerContext,
    ModelSizes,
    Positive,
    Shapes,
    Visibility,
)


class ConvolutionBlock(Block):
    """A gated short convolution, ``c * conv(b * x)`` of three projections (LFM2; Based, arXiv
    2402.18668, has one gate).
    """

    mixer: Literal["conv"]
    conv_kernel: Positive = 3
    """Number of tokens that it sees, including the token itself."""

    def build_mixer(self, context: MixerContext) -> Any:
        from .convolution_mixer import GatedConvolution

        return GatedConvolution(context, self.parameter_shapes(context.sizes, context.layer))

    def parameter_shapes(self, model: ModelSizes, layer: int) -> Shapes:
        width = model.num_attention_heads * model.kv_channels
        return {
            "linear_in.weight": (3 * width, model.hidden_size),
            "linear_proj.weight": (model.hidden_size, width),
            "conv_weight": (width, self.conv_kernel),
        }

    def mixing_flops(self, model: ModelSizes, length: int, layer: int) -> float:
        return 0.0  # the convolution is a product with each of its parameters

    def state_numbers(self, model: ModelSizes, length: int, layer: int) -> int:
        width = model.num_attention_heads * model.kv_channels
        return min(length, self.conv_kernel - 1) * width

    def exchanged_bytes(self, model: ModelSizes, layer: int, split: ContextSplit) -> float:
        width = model.num_attention_heads * model.kv_channels
        halo = (self.conv_kernel - 1) * width / split.tensor_ranks
        return 2 * 2 * split.segments * (split.ranks - 1) * halo

    def visibility(self, model: ModelSizes, positions: np.ndarray, source: int) -> Visibility:
        visible = (positions >= source) & (positions < source + self.conv_kernel)
        return Visibility(visible, visible)

    def exported(self, model: ModelSizes, layer: int) -> dict[str, Any]:
        return {"kind": "convolution", "conv_kernel": self.conv_kernel}
