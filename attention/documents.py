"""Several documents in one sequence, as every operation takes them: integer ids ``[batch, time]``."""

from torch import Tensor


def check_documents(documents: Tensor | None, shape: tuple[int, int]) -> None:
    """Refuse ids that are not integers of ``shape`` ``(batch, time)``, or that come back after another."""
    if documents is None:
        return
    if documents.shape != shape or documents.is_floating_point():
        raise ValueError(f"documents must be integers of shape {tuple(shape)}, got {tuple(documents.shape)}")
    if bool((documents[:, 1:] < documents[:, :-1]).any()):
        raise ValueError("documents must not decrease along time: sort the documents before packing them")


def one_document(documents: Tensor | None) -> bool:
    """Whether each row is a single document, so that nothing needs masking."""
    return documents is None or bool((documents[:, 0] == documents[:, -1]).all())
