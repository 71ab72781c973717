"""A gated short convolution, as a mixer of its own."""

from torch import Tensor

from ...parallel import Sequence, short_convolution
from .base import MixerContext, Shapes
from .mixer import Mixer, conv1d_uniform


class GatedConvolution(Mixer):
    """``c * conv(b * x)``; per head, a group of channels, the rows are ``b``, ``c`` and ``x``."""

    def __init__(self, context: MixerContext, shapes: Shapes):
        super().__init__(context, shapes, context.sizes.num_attention_heads)
        _, kernel = shapes["conv_weight"]
        self.conv_weight = self.split_parameter("conv_weight", conv1d_uniform(kernel))

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        return self.around(self._mix, hidden, sequence)

    def _mix(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        projected = self.project(hidden)  # [batch, time, local heads, 3 head_dim]
        b, c, x = (rows.flatten(2) for rows in projected.chunk(3, -1))  # [batch, time, channels]
        convolved = short_convolution(b * x, self.conv_weight, None, **self.tokens_of(sequence))
        return self.output(c * convolved)
