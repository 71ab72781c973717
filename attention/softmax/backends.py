"""The backends of softmax attention: what each of them must have, and the table of all.

To add one, write a module with the three functions of :class:`Backend` and a loader in
:data:`BACKENDS`.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..patterns import Pattern
from .tiles import LogitOptions, Tile


class Backend(Protocol):
    """A module that computes tiles."""

    def unsupported_reason(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
    ) -> str | None:
        """Return why this backend cannot compute the call exactly, or None if it can.

        The reason names another backend that can.
        """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Compute the output and the log-sum-exp, as described at :func:`tile_forward`."""

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of q, k and v, as described at :func:`tile_backward`."""


def _load_torch() -> Backend:
    from . import torch

    return torch


def _load_triton() -> Backend:
    from .triton import backend

    return backend


def _load_flash() -> Backend:
    from . import flash

    return flash


def _load_reference() -> Backend:
    from . import reference

    return reference


BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": _load_torch,
    "triton": _load_triton,
    "flash": _load_flash,
    "reference": _load_reference,
}
"""Name -> loader. A backend is imported on first use: some need packages that may be missing."""


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute the attention of one tile.

    Args:
        q: ``[batch, queries, heads, head_dim]``, at ``tile.q_positions`` of their document.
        k: ``[batch, keys, kv_heads, head_dim]``, at ``tile.k_positions``.
        v: ``[batch, keys, kv_heads, value_dim]``.
        backend: a name in :data:`BACKENDS`.

    Returns:
        The output ``[batch, queries, heads, value_dim]`` in the dtype of ``q``, and the log-sum-exp
        of each query's logits ``[batch, queries, heads]`` in fp32 (fp64 for fp64). A query that
        sees no key gives 0 and minus infinity.
    """
    return BACKENDS[backend]().forward(q, k, v, tile)


def tile_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    backend: str,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``q``, ``k`` and ``v`` in fp32 (fp64 for fp64).

    Args:
        out, lse: the queries' final output and log-sum-exp, over all keys that they see.
        grad_lse: gradient of ``lse``; None if the loss does not depend on it.
    """
    return BACKENDS[backend]().backward(grad_out, q, k, v, out, lse, tile, grad_lse)
