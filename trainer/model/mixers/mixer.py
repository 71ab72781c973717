"""What all mixers are: an input and an output projection around an operation of :mod:`longspan.parallel`, for Megatron-core.

Fused projections are laid out head by head, so that a tensor-parallel rank's rows are one slice of the whole matrix.
"""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Generator, Tensor, nn

from ..recompute import recomputed

Initial = Callable[[list[int], Generator], Tensor]
"""First values of a parameter that are not those of every matrix or vector: of the whole one, by its shape."""


class Mixer(MegatronModule):
    """Base: the two projections, and which heads are this rank's. Hidden states are Megatron's ``[time, batch, hidden]``,
    of the tokens that the sequence's layout gives this rank.

    Where ``recomputes`` is set, what lies before and after the operation is computed again in the backward pass.
    """

    recomputes = False

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        heads: int,
        rows: int,
        width: int,
    ):
        """``rows`` per head are projected from the hidden state; ``width`` of all heads together are projected back."""
        super().__init__(config)
        self.local_heads = heads // pg_collection.tp.size()
        self.first_head = pg_collection.tp.rank() * self.local_heads
        self.cp_group, self.tp_group = pg_collection.cp, pg_collection.tp
        shared = {
            "config": config,
            "bias": False,
            "skip_bias_add": True,
            "tp_group": pg_collection.tp,
        }
        self.linear_in = ColumnParallelLinear(
            config.hidden_size,
            heads * rows,
            init_method=config.init_method,
            gather_output=False,
            **shared,
        )
        self.linear_proj = RowParallelLinear(
            width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **shared,
        )

    def project(self, hidden: Tensor) -> Tensor:
        """``[batch, time, local heads, rows]``."""
        return self.linear_in(hidden)[0].transpose(0, 1).unflatten(-1, (self.local_heads, -1))

    def output(self, mixed: Tensor) -> Tensor:
        """From ``[batch, time, local width]`` to ``[time, batch, hidden]``."""
        return self.linear_proj(mixed.transpose(0, 1).contiguous())[0]

    def around(self, function: Callable, *inputs):
        """``function(*inputs)``, which comes before the operation or after it."""
        return recomputed(function, *inputs) if self.recomputes else function(*inputs)

    def per_head(self, initial: Initial, *shape: int) -> nn.Parameter:
        """A parameter whose first dim goes over this rank's heads, channels or the like; the whole one over those of all ranks.

        ``initial`` makes the whole one.
        """
        parameter = nn.Parameter(self.linear_in.weight.new_zeros(shape))
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        parameter.initial = initial
        return parameter


def zeros(shape: list[int], generator: Generator) -> Tensor:
    return torch.zeros(shape)


def uniform(low: float, high: float) -> Initial:
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low
