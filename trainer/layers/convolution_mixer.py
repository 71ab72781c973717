"""A gated short convolution, as a mixer of its own."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ...parallel import Sequence, short_convolution
from .convolution import ConvolutionBlock
from .mixer import Mixer, MixerOptions, conv1d_uniform


class GatedConvolution(Mixer):
    """``c * conv(b * x)``; per head, a group of channels, the rows are ``b``, ``c`` and ``x``."""

    def __init__(
        self,
        config: TransformerConfig,
        block: ConvolutionBlock,
        options: MixerOptions,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ):
        num_heads = config.num_attention_heads
        super().__init__(config, block, options, layer_number, pg_collection, num_heads)
        self.conv_weight = self.split_parameter("conv_weight", conv1d_uniform(block.conv_kernel))

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        return self.around(self._mix, hidden, sequence)

    def _mix(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        projected = self.project(hidden)  # [batch, time, local heads, 3 head_dim]
        b, c, x = (rows.flatten(2) for rows in projected.chunk(3, -1))  # [batch, time, channels]
        convolved = short_convolution(b * x, self.conv_weight, None, **self.tokens_of(sequence))
        return self.output(c * convolved)
