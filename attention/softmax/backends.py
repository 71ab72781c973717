"""The backends of softmax attention: what each of them must have, and the table of all.

To add one, write a module with the functions of :class:`TileBackend` and a loader in
:data:`TILE_BACKENDS`.
"""

from collections.abc import Callable
from functools import cache
from typing import Protocol

from torch import Tensor

from ..arguments import accumulation_dtype
from ..patterns import Pattern
from .tile_batch import TileBatch, TilePlace
from .tiles import Gradients, LogitOptions, Tile, merge_, new_head_major_lse


class Backend(Protocol):
    """A module that computes tiles."""

    def unsupported_reason(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
    ) -> str | None:
        """Return why this backend cannot compute the call exactly, or None if it can.

        The reason names another backend that can.
        """


class TileBackend(Backend, Protocol):
    """A module that computes one tile at a time."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Compute the attention of one tile.

        Args:
            q: ``[batch, queries, heads, head_dim]``, at ``tile.q_positions`` of their document.
            k: ``[batch, keys, kv_heads, head_dim]``, at ``tile.k_positions``.
            v: ``[batch, keys, kv_heads, value_dim]``.

        Returns:
            The output ``[batch, queries, heads, value_dim]`` in the dtype of ``q``, and the
            log-sum-exp of each query's logits ``[batch, queries, heads]`` in fp32 (fp64 for fp64).
            A query that sees no key gives 0 and minus infinity.
        """

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
        """Compute the gradients of ``q``, ``k`` and ``v`` in fp32 (fp64 for fp64).

        Args:
            out, lse: the queries' final output and log-sum-exp, over all keys that they see.
            grad_lse: gradient of ``lse``; None if the loss does not depend on it.
        """


class BatchBackend(Backend, Protocol):
    """A module that computes all tiles of a batch at once."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        logits: LogitOptions,
        tiles: TileBatch,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Compute what is described at :func:`forward_`."""

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
        pattern: Pattern,
        logits: LogitOptions,
        tiles: TileBatch,
        gradients: Gradients,
    ) -> None:
        """Compute what is described at :func:`backward_`."""


@cache
def _load_torch() -> TileBackend:
    from . import torch

    return torch


@cache
def _load_triton() -> BatchBackend:
    from .triton import backend

    return backend


@cache
def _load_flash() -> TileBackend:
    from . import flash

    return flash


@cache
def _load_reference() -> TileBackend:
    from . import reference

    return reference


TILE_BACKENDS: dict[str, Callable[[], TileBackend]] = {
    "torch": _load_torch,
    "flash": _load_flash,
    "reference": _load_reference,
}
BATCH_BACKENDS: dict[str, Callable[[], BatchBackend]] = {"triton": _load_triton}
BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": _load_torch,
    "triton": _load_triton,
    "flash": _load_flash,
    "reference": _load_reference,
}
"""Name -> loader. A backend is imported on first use: some need packages that may be missing."""


def new_lse(q: Tensor, backend: str) -> Tensor:
    """Return memory for the log-sum-exp of each query, as the backend prefers it.

    ``[batch, time, heads]`` in fp32 (fp64 for fp64).
    """
    dtype = accumulation_dtype(q)
    if backend in BATCH_BACKENDS:
        return new_head_major_lse(q, dtype)
    return q.new_empty(q.shape[:3], dtype=dtype)


def forward_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    logits: LogitOptions,
    tiles: TileBatch,
    backend: str,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Compute the attention of tiles and write it to their queries' places in ``out`` and ``lse``.

    Unless the tiles are the first of their queries, it is merged with what is there.

    Args:
        q: ``[batch, query slots, heads, head_dim]``.
        k: ``[batch, key columns, kv_heads, head_dim]``.
        v: ``[batch, key columns, kv_heads, value_dim]``.
        pattern: of these heads, in whatever document.
        backend: a name in :data:`BACKENDS`.
        out: ``[batch, query slots, heads, value_dim]``. A query that sees no key gets 0, ...
        lse: ``[batch, query slots, heads]`` in fp32 (fp64 for fp64), ... and minus infinity.
    """
    if backend in BATCH_BACKENDS:
        BATCH_BACKENDS[backend]().forward(q, k, v, pattern, logits, tiles, out, lse)
        return
    for place in tiles.places:
        queries, keys = _indices(place)
        tile = place_tile(place, pattern, logits)
        new_out, new_lse = TILE_BACKENDS[backend]().forward(q[queries], k[keys], v[keys], tile)
        if tiles.is_first:
            out[queries] = new_out
            lse[queries] = new_lse
        else:
            merge_(out[queries], lse[queries], new_out, new_lse, logits)


def backward_(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    pattern: Pattern,
    logits: LogitOptions,
    tiles: TileBatch,
    backend: str,
    gradients: Gradients,
) -> None:
    """Compute the gradients of the attention of tiles, and write or add them to ``gradients``.

    Args:
        out, lse: the queries' final output and log-sum-exp, over all keys that they see.
        grad_lse: gradient of ``lse``; None if the loss does not depend on it.
    """
    if backend in BATCH_BACKENDS:
        BATCH_BACKENDS[backend]().backward(
            grad_out, q, k, v, out, lse, grad_lse, pattern, logits, tiles, gradients
        )
        return
    for place in tiles.places:
        queries, keys = _indices(place)
        of_tile = TILE_BACKENDS[backend]().backward(
            grad_out[queries],
            q[queries],
            k[keys],
            v[keys],
            out[queries],
            lse[queries],
            place_tile(place, pattern, logits),
            None if grad_lse is None else grad_lse[queries],
        )
        for total, index, gradient in zip(
            gradients[:3], (queries, keys, keys), of_tile, strict=True
        ):
            if gradients.accumulate:
                total[index] += gradient
            else:
                total[index] = gradient


def _indices(place: TilePlace) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where a tile's queries and keys are in their tensors."""
    return (place.batch, place.query_slots), (place.batch, place.key_columns)


def place_tile(place: TilePlace, pattern: Pattern, logits: LogitOptions) -> Tile:
    """Return the tile at a place, whose pattern is the one of its document."""
    of_document = pattern.in_document(place.batch, *place.document)
    return Tile(of_document, (place.q_positions,), (place.k_positions,), logits)
