"""Several documents in one sequence, marked by integer ids ``[batch, time]`` as in every operation.

Every layer needs to know on the host where documents begin. Reading that from a GPU waits for it,
so on a GPU the answer is kept for each tensor of ids, with what layers make of it: see
:func:`kept_for`. Such a tensor must only be written to by torch, which counts its versions.
"""

from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class DocumentSpan(NamedTuple):
    """Tokens ``start`` to ``stop`` of a batch row, which are one document."""

    batch_row: int
    start: int
    stop: int


Kept = TypeVar("Kept")

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tensor of ids -> (its version, what was made of these ids, by key)."""


def is_kept(documents: Tensor) -> bool:
    """Return whether what is made of these ids is kept.

    On the CPU making it is cheap, and code outside torch may write to the memory. Tensors made in
    inference mode have no version that counts writes.
    """
    return documents.is_cuda and not documents.is_inference()


def kept_for(documents: Tensor, key: Hashable, make: Callable[[], Kept]) -> Kept:
    """Return ``make()``, on a GPU the same object as long as the ids are the same.

    Args:
        key: of what is made, different for each ``make``.
    """
    if not is_kept(documents):
        return make()
    made = _kept_of_version(documents)
    if key not in made:
        made[key] = make()
    return made[key]


def _kept_of_version(documents: Tensor) -> dict[Hashable, Any]:
    version, made = _kept.get(documents, (None, {}))
    if version != documents._version:
        made = {}
        _kept[documents] = (documents._version, made)
    return made


def check_documents(documents: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Check ids against the shape ``(batch, time)``.

    Returns:
        The ids, or None if each batch row is a single document, so that nothing needs masking.

    Raises:
        ValueError: for ids that are not integers, have another shape, or decrease along time.
    """
    if documents is None:
        return None
    if documents.shape != shape or documents.is_floating_point():
        dtype = str(documents.dtype).removeprefix("torch.")
        raise ValueError(
            f"documents must be integers of shape {tuple(shape)}, "
            f"got {dtype} of shape {tuple(documents.shape)}"
        )
    batch_size = len(documents)
    return documents if len(document_spans(documents)) > batch_size else None


def document_spans(documents: Tensor) -> list[DocumentSpan]:
    """Return the span of each document, row by row in order."""
    return kept_for(documents, "spans", lambda: list(_find_spans(documents.cpu())))


def ids_of_tokens(documents: Tensor, tokens: slice) -> Tensor:
    """Return ``documents[:, tokens]``, ``tokens`` having a start and a stop.

    On a GPU it is the same tensor at each call, whose spans are known without asking the GPU.
    """
    if not is_kept(documents):
        return documents[:, tokens]

    def cut() -> Tensor:
        # A copy: a view would keep the whole tensor alive, and with it this entry.
        part = documents[:, tokens].clone()
        _kept_of_version(part)["spans"] = [
            DocumentSpan(
                span.batch_row,
                max(span.start, tokens.start) - tokens.start,
                min(span.stop, tokens.stop) - tokens.start,
            )
            for span in document_spans(documents)
            if span.start < tokens.stop and span.stop > tokens.start
        ]
        return part

    return kept_for(documents, ("ids", tokens.start, tokens.stop), cut)


def _find_spans(documents: Tensor) -> Iterator[DocumentSpan]:
    if bool((documents[:, 1:] < documents[:, :-1]).any()):
        raise ValueError(
            "documents must not decrease along time: sort the documents before packing them"
        )
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = is_first.nonzero().tolist()  # (batch row, position)
    length = documents.shape[1]
    for (row, start), (next_row, next_start) in pairwise([*starts, [-1, 0]]):
        yield DocumentSpan(row, start, next_start if next_row == row else length)


def document_starts(ids: Tensor) -> Tensor:
    """Return where the document of each token or block begins: int64, the shape of ``ids``.

    Args:
        ids: ``[batch, tokens or blocks]``, the same for all of a document, which are side by side.
    """
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return (torch.arange(ids.shape[1], device=ids.device) * begins).cummax(1).values
