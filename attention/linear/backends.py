"""The backends of linear attention: what each of them must have, and the table of all.

To add one, write a module with the two functions of :class:`Backend` and a loader in
:data:`BACKENDS`.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """A module that computes linear attention."""

    def unsupported_reason(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
    ) -> str | None:
        """Return why this backend cannot compute the call exactly, or None if it can.

        The reason names another backend that can.
        """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        scale: float,
        state: Tensor,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the output and the state after the last token.

        Arguments are those of :func:`~longspan.attention.linear_attention`, already checked. The
        result is differentiable in all tensors but ``documents``.
        """


def _load_torch() -> Backend:
    from . import torch

    return torch


def _load_triton() -> Backend:
    from .triton import backend

    return backend


def _load_fla() -> Backend:
    from . import fla

    return fla


def _load_reference() -> Backend:
    from . import reference

    return reference


BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": _load_torch,
    "triton": _load_triton,
    "fla": _load_fla,
    "reference": _load_reference,
}
"""Name -> loader. A backend is imported on first use: some need packages that may be missing."""
