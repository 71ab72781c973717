"""Documents cut into pieces, which programs compute: chunks of the stages, segments of the scan.

No piece crosses the edge of a document. So a kernel knows nothing of documents but where its piece
ends, one launch computes all of them, and what other documents hold, NaN included, is never read.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...documents import DocumentSpan, document_spans, kept_for
from ...triton_device import table_on


class Pieces(NamedTuple):
    """The pieces of a batch, document by document.

    A *slot* is a place for the state at the edge of a piece. There is none between two documents,
    where the state starts again: so slots are few, also if documents are many and short.
    """

    table: Tensor
    """int32 ``[pieces, 5]``: batch row, first token, the token after the last, and the slots of the
    states before and after the piece, -1 for none."""
    documents: Tensor
    """int32 ``[documents, 2]``: the first piece of each, and its number of pieces."""
    slots: int
    """Slots before the first token of each batch row, then those after the last token of each, then
    those between the pieces of a document."""


def pieces_of(
    documents: Tensor | None, shape: tuple[int, int], size: int, device: torch.device
) -> Pieces:
    """Return the pieces of at most ``size`` tokens.

    Args:
        documents: int ``[batch, time]``, or None if each batch row is one document.
        shape: ``(batch, time)``.
    """
    if documents is None:
        return _pieces_of_rows(shape, size, device)
    return kept_for(
        documents,
        ("pieces", size),
        lambda: _cut(document_spans(documents), shape, size, device),
    )


@lru_cache(maxsize=32)
def _pieces_of_rows(shape: tuple[int, int], size: int, device: torch.device) -> Pieces:
    batch, length = shape
    return _cut([DocumentSpan(row, 0, length) for row in range(batch)], shape, size, device)


def _cut(
    spans: list[DocumentSpan], shape: tuple[int, int], size: int, device: torch.device
) -> Pieces:
    """Cut documents into pieces of ``size`` tokens, the last of each possibly shorter."""
    batch, length = shape
    row, start, stop = np.array(spans).T
    counts = (stop - start + size - 1) // size
    first_piece = counts.cumsum() - counts

    # Of each piece: its document, its number there, its tokens.
    document = np.arange(len(spans)).repeat(counts)
    number = np.arange(len(document)) - first_piece[document]
    piece_start = start[document] + number * size
    piece_stop = np.minimum(piece_start + size, stop[document])
    is_last = piece_stop == stop[document]

    # The slots around it.
    before_row = np.where(piece_start == 0, row[document], -1)
    after_row = np.where(piece_stop == length, batch + row[document], -1)
    between = 2 * batch + (~is_last).cumsum() - 1
    after = np.where(is_last, after_row, between)
    before = np.where(number == 0, before_row, np.roll(after, 1))

    table = np.stack([row[document], piece_start, piece_stop, before, after], 1)
    return Pieces(
        table_on(table, device),
        table_on(np.stack([first_piece, counts], 1), device),
        2 * batch + int((~is_last).sum()),
    )


@triton.jit
def load_piece(PIECES, n):
    """Load what the table says of a piece.

    Its batch row (int64), its first token, the token after its last, and the slots before and after
    it.
    """
    row = tl.load(PIECES + n * 5).to(tl.int64)
    start = tl.load(PIECES + n * 5 + 1)
    stop = tl.load(PIECES + n * 5 + 2)
    before, after = load_slots(PIECES, n)
    return row, start, stop, before, after


@triton.jit
def load_slots(PIECES, n):
    """Load the slots before and after a piece."""
    return tl.load(PIECES + n * 5 + 3), tl.load(PIECES + n * 5 + 4)


@triton.jit
def load_document(DOCUMENTS, n):
    """Load the first piece of a document and its number of pieces."""
    return tl.load(DOCUMENTS + 2 * n), tl.load(DOCUMENTS + 2 * n + 1)
