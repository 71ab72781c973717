"""Several documents in one sequence, as every operation takes them: integer ids ``[batch, time]``.

Where documents begin is needed on the host, by every layer. To ask a GPU is to wait for it: there it is found once for each
tensor of ids, which must not be written to behind torch's back.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_documents(documents: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Refuse ids that are not integers of ``shape`` ``(batch, time)``, or that come back after another.

    Returns:
        The ids, or None where each row is a single document, so that nothing needs masking.
    """
    if documents is None:
        return None
    if documents.shape != shape or documents.is_floating_point():
        found = f"{str(documents.dtype).removeprefix('torch.')} of shape {tuple(documents.shape)}"
        raise ValueError(f"documents must be integers of shape {tuple(shape)}, got {found}")
    return documents if len(document_spans(documents)) > len(documents) else None


def document_spans(documents: Tensor) -> list[tuple[int, int, int]]:
    """(batch row, start, stop) of each document, in order."""
    if (
        not documents.is_cuda or documents.is_inference()
    ):  # cheap, and others may write to the memory; or nobody counts writes
        return list(_spans(documents.cpu()))
    version, spans = _found.get(documents, (None, []))
    if version != documents._version:
        spans = list(_spans(documents.cpu()))
        _found[documents] = (documents._version, spans)
    return spans


def _spans(documents: Tensor):
    if bool((documents[:, 1:] < documents[:, :-1]).any()):
        raise ValueError(
            "documents must not decrease along time: sort the documents before packing them"
        )
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.nonzero().tolist()
    for (row, start), (next_row, stop) in pairwise([*starts, [-1, 0]]):
        yield row, start, stop if next_row == row else documents.shape[1]
