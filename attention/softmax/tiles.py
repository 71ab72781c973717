"""Tiles: queries and keys anywhere in a document, and how partial results of a query add up.
A tile's forward pass gives the log-sum-exp beside the output. Its backward pass needs the *final*
output and log-sum-exp of a query, whatever share of the query's keys the tile holds. So partial
results add up: over parts of a tile in a backend, over ranks in :mod:`longspan.parallel`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..patterns import Blocks, Pattern


@dataclass(frozen=True)
class LogitOptions:
    """How the products of queries with keys become weights.

    Args:
        scale: factor of the products.
        softcap: ``x -> softcap * tanh(x / softcap)`` on the scaled products (Gemma 2), or None.
        sigmoid_bias: None for softmax over the visible keys; a number for the weight
            ``sigmoid(x + sigmoid_bias)`` of each key (arXiv 2409.04431). Such weights have no
            log-sum-exp (it is given as 0), and their partial results are summed.
    """

    scale: float
    softcap: float | None = None
    sigmoid_bias: float | None = None

    @property
    def is_softmax(self) -> bool:
        """Whether the weights of a query sum to 1."""
        return self.sigmoid_bias is None

    @property
    def lse_without_keys(self) -> float:
        """The log-sum-exp of a query that sees no key."""
        return -torch.inf if self.is_softmax else 0.0


@dataclass(frozen=True)
class Tile:
    """What a tile needs besides its tensors.

    Args:
        q_positions, k_positions: positions in the document, as short lists of block ranges, in the
            order of the tensors' tokens and ascending within each range. So a compact buffer of
            stripes, or a halo, is a set of keys like any other.
    """

    pattern: Pattern
    q_positions: tuple[Blocks, ...]
    k_positions: tuple[Blocks, ...]
    logits: LogitOptions


class Gradients(NamedTuple):
    """Memory for the gradients of queries, keys and values, in fp32 (fp64 for fp64)."""

    q: Tensor
    k: Tensor
    v: Tensor
    accumulate: bool
    """Whether to add to what is there. Otherwise the tiles hold every token."""


def new_head_major_lse(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for the log-sum-exp of each query of ``q``: ``[batch, time, heads]``.

    The queries of a head are side by side in it, as kernels read them.
    """
    batch, length, heads, _ = q.shape
    return q.new_empty(batch, heads, length, dtype=dtype).transpose(1, 2)


def merge_(
    out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, logits: LogitOptions
) -> None:
    """Add a partial result over other keys to ``out`` and ``lse``, in place.

    Args:
        out, new_out: ``[..., value_dim]``.
        lse, new_lse: ``[...]``.
    """
    if not logits.is_softmax:
        out += new_out
        return
    # The softmax of the two log-sum-exps weighs the parts. If neither saw a key, inf - inf is NaN.
    new_weight = (new_lse - lse).sigmoid_().nan_to_num_(0.0)
    out.lerp_(new_out.to(out.dtype), new_weight.to(out.dtype)[..., None])
    torch.logaddexp(lse, new_lse, out=lse)
