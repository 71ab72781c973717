"""What travels with a batch: where its tokens sit and which document each belongs to."""

from functools import cached_property

import torch
from torch import Tensor

from ..attention import rotary_tables
from .layout import Layout


class Sequence:
    """The documents of a batch under a layout, as one rank sees them.

    It reaches the mixers as Megatron's ``packed_seq_params`` and alone says where a token stands in its document.

    Args:
        layout: of the ``time`` tokens over the ranks that share the sequence.
        rank: this rank's index in the layout.
        documents: int32 ``[batch, time]`` for the whole sequence, non-decreasing along time.
    """

    def __init__(self, layout: Layout, rank: int, documents: Tensor):
        if documents.ndim != 2 or documents.shape[1] != layout.length:
            raise ValueError(
                f"documents must be [batch, {layout.length}], got {tuple(documents.shape)}"
            )
        self.layout, self.rank, self.all_documents = layout, rank, documents
        self._rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    @classmethod
    def single(cls, batch: int, length: int, device: torch.device) -> "Sequence":
        """One document per row, on one rank."""
        return cls(
            Layout.contiguous(length),
            0,
            torch.zeros(batch, length, dtype=torch.int32, device=device),
        )

    @cached_property
    def documents(self) -> Tensor:
        """Document ids of this rank's tokens: int32 ``[batch, local time]``."""
        return self.layout.shard(self.all_documents, self.rank)

    @cached_property
    def positions(self) -> Tensor:
        """Where this rank's tokens stand in their documents, from 0: int64 ``[batch, local time]``."""
        index = torch.arange(self.layout.length, device=self.all_documents.device).expand_as(
            self.all_documents
        )
        starts = torch.zeros_like(index)
        starts[:, 1:] = index[:, 1:] * (self.all_documents[:, 1:] != self.all_documents[:, :-1])
        return self.layout.shard(index - starts.cummax(1).values, self.rank)

    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Rotary tables of this rank's tokens, fp32 ``[batch, local time, dim / 2]``, made once for all layers."""
        key = (dim, theta)
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.positions, dim, theta)
        return self._rotary[key]
