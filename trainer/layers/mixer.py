"""What all mixers are: an input and an output projection around an operation of :mod:`longspan.parallel`, for Megatron-core.

Fused projections are laid out head by head, so that a tensor-parallel rank's rows are one slice of the whole matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Generator, Tensor, nn

from ...parallel import Sequence
from .base import Block
from .recompute import recomputed

Initial = Callable[[list[int], Generator], Tensor]
"""First values of a parameter that are not those of every matrix or vector: of the whole one, by its shape."""


@dataclass(frozen=True)
class MegatronSizes:
    """The sizes that a Megatron config names otherwise, as :class:`.base.ModelSizes`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_heads: int
    kv_channels: int

    @classmethod
    def of(cls, config: TransformerConfig) -> "MegatronSizes":
        return cls(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            kv_heads=config.num_query_groups,
            kv_channels=config.kv_channels,
        )


class MixerOptions(NamedTuple):
    """What a mixer must know that neither its block nor Megatron's config says."""

    rope_theta: float = 10000.0
    schedule: str = "auto"
    """How context-parallel ranks share softmax attention, as :func:`longspan.parallel.attend` takes it."""
    recomputes: bool = False
    """Whether what lies before and after the operation is computed again in the backward pass."""


class Mixer(MegatronModule):
    """Base: the two projections, and which heads are this rank's. Hidden states are Megatron's ``[time, batch, hidden]``,
    of the tokens that the sequence's layout gives this rank.

    Args:
        num_heads: how many equal parts the rows of the input projection have, which tensor parallelism divides among
            ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: Block,
        options: MixerOptions,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        num_heads: int,
    ):
        super().__init__(config)
        self.layer = layer_number - 1  # Megatron counts from 1
        self.shapes = block.parameter_shapes(MegatronSizes.of(config), self.layer)
        self.rope_theta = options.rope_theta
        self.recomputes = options.recomputes
        self.cp_group, self.tp_group = pg_collection.cp, pg_collection.tp
        self.local_heads = num_heads // self.tp_group.size()
        self.first_head = self.tp_group.rank() * self.local_heads

        projected, hidden_size = self.shapes["linear_in.weight"]
        width = self.shapes["linear_proj.weight"][1]
        shared: dict[str, Any] = {
            "config": config,
            "bias": False,
            "skip_bias_add": True,
            "tp_group": self.tp_group,
        }
        self.linear_in = ColumnParallelLinear(
            hidden_size,
            projected,
            init_method=config.init_method,
            gather_output=False,
            **shared,
        )
        self.linear_proj = RowParallelLinear(
            width,
            hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **shared,
        )

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        """Mix the tokens of ``[time, batch, hidden]``; the same shape."""
        raise NotImplementedError

    def project(self, hidden: Tensor) -> Tensor:
        """``[batch, time, local heads, rows]``."""
        return self.linear_in(hidden)[0].transpose(0, 1).unflatten(-1, (self.local_heads, -1))

    def output(self, mixed: Tensor) -> Tensor:
        """From ``[batch, time, local width]`` to ``[time, batch, hidden]``."""
        return self.linear_proj(mixed.transpose(0, 1).contiguous())[0]

    def tokens_of(self, sequence: Sequence) -> dict[str, Any]:
        """The keyword arguments by which operations of :mod:`longspan.parallel` know whose tokens these are."""
        return {
            "layout": sequence.layout,
            "group": self.cp_group,
            "documents": sequence.all_documents,
        }

    def around(self, function: Callable, *inputs):
        """``function(*inputs)``, which comes before the operation or after it."""
        return recomputed(function, *inputs) if self.recomputes else function(*inputs)

    def split_parameter(self, name: str, initial: Initial) -> nn.Parameter:
        """The parameter ``name`` of ``shapes``, whose first dim tensor-parallel ranks share. ``initial`` makes the whole one."""
        rows, *others = self.shapes[name]
        local = self.linear_in.weight.new_zeros(rows // self.tp_group.size(), *others)
        parameter = nn.Parameter(local)
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        parameter.initial = initial
        return parameter


def zeros(shape: list[int], generator: Generator) -> Tensor:
    return torch.zeros(shape)


def uniform(low: float, high: float) -> Initial:
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low


def conv1d_uniform(kernel: int) -> Initial:
    """As torch.nn.Conv1d begins with, for a convolution of each channel alone."""
    bound = kernel**-0.5
    return uniform(-bound, bound)
