"""Tiles: queries and keys anywhere in a document.

Forward gives the log-sum-exp beside the output; backward takes the *final* output and log-sum-exp of a row, whatever share
of its keys the tile holds. So partial results add up: over parts of a tile in a backend, over ranks in
:mod:`longspan.parallel`.
"""

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from ..patterns.patterns import Pattern
from ..patterns.rules import Blocks

BACKENDS = {
    "torch": "torch",
    "triton": "triton.backend",
    "flash": "flash",
    "reference": "reference",
}
"""Module of each backend; imported when it is asked for. Each has ``forward``, ``backward`` and ``unsupported_reason``."""


@dataclass(frozen=True)
class Logits:
    """How a query's products with its keys become weights.

    Args:
        scale: of the products.
        softcap: ``x -> softcap * tanh(x / softcap)`` on the scaled products (Gemma 2), or None.
        sigmoid_bias: None for softmax over the visible keys; a number for ``sigmoid(x + sigmoid_bias)`` of each (arXiv
            2409.04431), whose rows have no log-sum-exp (it is given as 0) and whose partial results are summed.
    """

    scale: float
    softcap: float | None = None
    sigmoid_bias: float | None = None


@dataclass(frozen=True)
class Tile:
    """What a tile is beside its tensors.

    Args:
        q_at, k_at: positions in the document, as short lists of block ranges, in the order of the rows and ascending within
            each range: a compact buffer of stripes, or a halo, is a key set like any other.
    """

    pattern: Pattern
    q_at: tuple[Blocks, ...]
    k_at: tuple[Blocks, ...]
    logits: Logits


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of one tile.

    Args:
        q: ``[batch, queries, heads, head_dim]``, standing at ``tile.q_at`` in their document.
        k: ``[batch, keys, kv_heads, head_dim]``, standing at ``tile.k_at``.
        v: ``[batch, keys, kv_heads, value_dim]``.
        backend: a name in :data:`BACKENDS`.

    Returns:
        The output ``[batch, queries, heads, value_dim]`` in the dtype of ``q``, and the log-sum-exp of each row's logits
        ``[batch, queries, heads]`` in fp32 (fp64 for fp64). A row that sees nothing gives 0 and minus infinity.
    """
    return load(backend).forward(q, k, v, tile)


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
    """Gradients of ``q``, ``k`` and ``v`` in fp32 (fp64 for fp64), from the final ``out`` and ``lse`` of the rows."""
    return load(backend).backward(grad_out, q, k, v, out, lse, tile, grad_lse)


def load(backend: str):
    """The module of a backend."""
    return import_module(f".{BACKENDS[backend]}", __package__)


def merge_(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor, logits: Logits) -> None:
    """Add a partial result over other keys to ``out`` ``[..., value_dim]`` and ``lse`` ``[...]``, in place."""
    if logits.sigmoid_bias is not None:
        out += new
        return
    # Softmax weights of the two parts; where neither saw a key, inf - inf is no reason for NaN.
    weight = (new_lse - lse).sigmoid_().nan_to_num_(0.0)
    out.lerp_(new.to(out.dtype), weight.to(out.dtype)[..., None])
    torch.logaddexp(lse, new_lse, out=lse)
