"""Many tiles in larger tensors, which are computed together.

Nothing here imports torch, so that plans can be made without it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

from ..patterns import Blocks


class Document(NamedTuple):
    """The tokens ``start`` to ``stop - 1`` of a batch row, which attend to each other only."""

    start: int
    stop: int


@dataclass(frozen=True)
class TilePlace:
    """Where a tile's queries and keys are, in tensors ``[batch, time, heads, dim]`` and documents.

    Args:
        batch: rows of the batch.
        query_slots: tokens of the queries, in the tensors of queries.
        key_columns: tokens of the keys, in the tensors of keys and values.
        document: the document; ``q_positions`` and ``k_positions`` count from its first token.
    """

    batch: slice
    query_slots: slice
    key_columns: slice
    document: Document
    q_positions: Blocks
    k_positions: Blocks


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles of the same heads and pattern, such that no token is in two of them.

    So they can be computed in any order, or at once. A batch is equal to itself only, and what a
    backend prepares for it is kept as long as it is used.

    Args:
        places: of the tiles.
        is_first: whether their queries have no result from earlier batches.
    """

    places: tuple[TilePlace, ...]
    is_first: bool = True
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What backends have prepared for it."""

    @classmethod
    def of_documents(
        cls, batch_size: int, length: int, spans: Iterable[tuple[int, int, int]]
    ) -> Self:
        """Return one tile for each document of whole sequences, with all of its tokens.

        Args:
            spans: row, first token and the one after the last of each document; none if every row
                of the batch is one document.
        """
        places = [
            _whole_document(slice(row, row + 1), Document(start, stop))
            for row, start, stop in spans
        ]
        return cls(tuple(places) or (_whole_document(slice(0, batch_size), Document(0, length)),))

    @cached_property
    def longest_document(self) -> int:
        """The number of tokens of the longest document."""
        return max(place.document.stop - place.document.start for place in self.places)


def _whole_document(batch: slice, document: Document) -> TilePlace:
    tokens = slice(document.start, document.stop)
    positions = Blocks(0, 1, document.stop - document.start)
    return TilePlace(batch, tokens, tokens, document, positions, positions)
