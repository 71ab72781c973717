"""A gated short convolution, as a mixer of its own."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ....parallel import Sequence, short_convolution
from ...recipe.layers.linear import ConvolutionBlock
from .mixer import Mixer, uniform


class GatedConvolution(Mixer):
    """``c * conv(b * x)``; per head, a group of channels, the rows are ``b``, ``c`` and ``x``."""

    def __init__(
        self,
        config: TransformerConfig,
        block: ConvolutionBlock,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ):
        heads, dim = config.num_attention_heads, config.kv_channels
        super().__init__(config, pg_collection, heads, 3 * dim, heads * dim)
        bound = block.conv_kernel**-0.5  # torch.nn.Conv1d's
        self.conv_weight = self.per_head(
            uniform(-bound, bound), self.local_heads * dim, block.conv_kernel
        )

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        return self.around(self._mixed, hidden, sequence)

    def _mixed(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        b, c, x = (part.flatten(2) for part in self.project(hidden).chunk(3, -1))
        where = {
            "layout": sequence.layout,
            "group": self.cp_group,
            "documents": sequence.all_documents,
        }
        return self.output(c * short_convolution(b * x, self.conv_weight, None, **where))
