"""What travels with a batch: where its tokens sit, and which document each belongs to."""

from functools import cached_property

import torch
from torch import Tensor

from ..attention import rotary_tables
from .layout import Layout


class Sequence:
    """The documents of a batch under a layout, as one rank sees them.

    It reaches the mixers as Megatron's ``packed_seq_params``, and is the only source of where a
    token is in its document.

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
        self.layout = layout
        self.rank = rank
        self.all_documents = documents
        self._rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    @classmethod
    def single(cls, batch: int, length: int, device: torch.device) -> "Sequence":
        """Return sequences of one document each, on one rank."""
        documents = torch.zeros(batch, length, dtype=torch.int32, device=device)
        return cls(Layout.contiguous(length), 0, documents)

    @cached_property
    def documents(self) -> Tensor:
        """Document ids of this rank's tokens: int32 ``[batch, local time]``."""
        return self.layout.shard(self.all_documents, self.rank)

    @cached_property
    def positions(self) -> Tensor:
        """Positions of this rank's tokens in their documents: int64 ``[batch, local time]``."""
        documents = self.all_documents
        index = torch.arange(self.layout.length, device=documents.device).expand_as(documents)
        is_new = documents[:, 1:] != documents[:, :-1]
        document_start = torch.zeros_like(index)
        document_start[:, 1:] = index[:, 1:] * is_new
        document_start = document_start.cummax(1).values
        return self.layout.shard(index - document_start, self.rank)

    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Return rotary tables of this rank's tokens: fp32 ``[batch, local time, dim / 2]``.

        They are made once for all layers.
        """
        key = (dim, theta)
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.positions, dim, theta)
        return self._rotary[key]
