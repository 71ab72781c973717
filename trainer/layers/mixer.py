"""The base of all mixers: an input and an output projection around an operation of
:mod:`longspan.parallel`, for Megatron-core.

Fused projections are laid out head by head, so that a tensor-parallel rank's rows are one slice of
the whole matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ...parallel import Sequence
from ..megatron_core import (
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    TransformerConfig,
    set_tensor_model_parallel_attributes,
)
from .base import MixerContext, Shapes
from .recompute import recomputed

InitialValues = Callable[[list[int], Generator], Tensor]
"""A function that makes the whole parameter, before it is split over ranks, from its shape."""


@dataclass(frozen=True)
class MegatronSizes:
    """The sizes in a Megatron config, by the names of :class:`.base.ModelSizes`."""

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


class Mixer(MegatronModule):
    """Base of all mixers: the two projections, and which heads are this rank's.

    Hidden states are Megatron's ``[time, batch, hidden]``: the tokens that the sequence's layout
    gives this rank.

    Args:
        shapes: shapes of all parameters, as :meth:`.base.Block.parameter_shapes` returns them.
        num_heads: number of heads whose rows the input projection has one after another, which
            tensor parallelism divides among ranks.
    """

    def __init__(self, context: MixerContext, shapes: Shapes, num_heads: int):
        config = context.config
        super().__init__(config)
        self.shapes = shapes
        self.rope_theta = context.rope_theta
        self.recomputes = context.recomputes
        self.cp_group = context.process_groups.cp
        self.tp_group = context.process_groups.tp
        self.local_heads = num_heads // self.tp_group.size()
        self.first_head = self.tp_group.rank() * self.local_heads

        input_rows, hidden_size = shapes["linear_in.weight"]
        _, width = shapes["linear_proj.weight"]
        shared: dict[str, Any] = {
            "config": config,
            "bias": False,
            "skip_bias_add": True,
            "tp_group": self.tp_group,
        }
        self.linear_in = ColumnParallelLinear(
            hidden_size,
            input_rows,
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
        """Mix the tokens of ``hidden [time, batch, hidden]``; the output has the same shape."""
        raise NotImplementedError

    def project(self, hidden: Tensor) -> Tensor:
        """Return the input projection, head by head: ``[batch, time, local heads, rows]``."""
        projected, _ = self.linear_in(hidden)  # [time, batch, local rows]
        return projected.transpose(0, 1).unflatten(-1, (self.local_heads, -1))

    def output(self, mixed: Tensor) -> Tensor:
        """Project ``[batch, time, local width]`` to ``[time, batch, hidden]``."""
        projected, _ = self.linear_proj(mixed.transpose(0, 1).contiguous())
        return projected

    def tokens_of(self, sequence: Sequence) -> dict[str, Any]:
        """Return the keyword arguments of :mod:`longspan.parallel` that say which tokens this rank
        has, and which documents they belong to.
        """
        return {
            "layout": sequence.layout,
            "group": self.cp_group,
            "documents": sequence.all_documents,
        }

    def around(self, function: Callable, *inputs):
        """Return ``function(*inputs)``, a step before the operation or after it.

        If this layer recomputes, it is computed again in the backward pass.
        """
        return recomputed(function, *inputs) if self.recomputes else function(*inputs)

    def split_parameter(self, name: str, initial: InitialValues) -> nn.Parameter:
        """Make the parameter ``name`` of ``shapes``; tensor-parallel ranks split its first dim."""
        rows, *others = self.shapes[name]
        values = self.linear_in.weight.new_zeros(rows // self.tp_group.size(), *others)
        parameter: Any = nn.Parameter(values)  # with marks for Megatron and for our initialization
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        parameter.initial = initial
        return parameter


def zeros(shape: list[int], generator: Generator) -> Tensor:
    return torch.zeros(shape)


def ones(shape: list[int], generator: Generator) -> Tensor:
    return torch.ones(shape)


def uniform(low: float, high: float) -> InitialValues:
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low


def conv1d_uniform(kernel: int) -> InitialValues:
    """Return the initial values of ``torch.nn.Conv1d`` with one channel per group."""
    bound = kernel**-0.5
    return uniform(-bound, bound)
