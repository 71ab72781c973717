"""Tiles: a stretch of queries against the keys of their document up to them.

Forward gives the log-sum-exp beside the output; backward takes the *final* output and log-sum-exp of a row, whatever share of
its keys the tile holds. So partial results add up, over parts of a tile here and over ranks in :mod:`longspan.parallel`.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import accumulation_dtype
from .patterns import Causal, Pattern


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, q_at: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of one tile.

    Args:
        q: ``[batch, queries, heads, head_dim]``, standing at positions ``q_at, q_at + 1, ...`` of their document.
        k: ``[batch, q_at + queries, kv_heads, head_dim]``, from the document's first key.
        v: ``[batch, q_at + queries, kv_heads, value_dim]``.
        backend: a name in :data:`BACKENDS`.

    Returns:
        The output ``[batch, queries, heads, value_dim]`` in the dtype of ``q``, and the log-sum-exp of each row's logits
        ``[batch, queries, heads]`` in fp32 (fp64 for fp64).
    """
    out, lse = BACKENDS[backend].forward(*_heads_first(q, k, v), pattern, q_at, scale)
    return out[..., : v.shape[-1]].transpose(1, 2), lse.transpose(1, 2)


def tile_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: Pattern,
    q_at: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v`` in fp32 (fp64 for fp64), from the final ``out`` and ``lse`` of the rows."""
    tensors = _heads_first(grad_out, q, k, v, out)
    dq, dk, dv = BACKENDS[backend].backward(*tensors, lse.transpose(1, 2), pattern, q_at, scale)
    return tuple(x[..., : like.shape[-1]].transpose(1, 2) for x, like in ((dq, q), (dk, k), (dv, v)))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """``[batch, heads, time, dim]``, all of one dim: zeros added to keys or values change nothing."""
    dim = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, dim - x.shape[-1])).transpose(1, 2) if x.shape[-1] < dim else x.transpose(1, 2) for x in tensors]


class Dense:
    """Every pair of the tile, hidden ones masked, in fp64: the oracle."""

    @staticmethod
    def forward(q, k, v, pattern: Pattern, q_at: int, scale: float):
        out, lse = _formula_forward(*_doubles(q, k, v), Dense._visible(q, k, pattern, q_at), scale)
        return out.to(q.dtype), lse.to(accumulation_dtype(q))

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, pattern: Pattern, q_at: int, scale: float):
        gradients = _formula_backward(*_doubles(grad_out, q, k, v, out, lse), Dense._visible(q, k, pattern, q_at), scale)
        return [gradient.to(accumulation_dtype(q)) for gradient in gradients]

    @staticmethod
    def _visible(q, k, pattern, q_at):
        at = torch.arange(k.shape[2], device=q.device)
        return pattern.mask(at[q_at:], at, k.shape[1])


class Parts:
    """Only the keys that the pattern needs, in a few pieces; work grows with the pairs that it shows."""

    @staticmethod
    def forward(q, k, v, pattern: Pattern, q_at: int, scale: float):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
        for part in _parts(pattern, q_at, q.shape[2], k.shape[1], q.device):
            new, new_lse = _part_forward(q[:, :, part.queries], part.gather(k), part.gather(v), part.visible, scale)
            if part.adds:
                new, new_lse = _merge(out[:, :, part.queries], lse[:, :, part.queries], new, new_lse)
            out[:, :, part.queries], lse[:, :, part.queries] = new, new_lse
        return out, lse

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, pattern: Pattern, q_at: int, scale: float):
        keys = k.shape[2]
        dq = torch.zeros(q.shape, dtype=accumulation_dtype(q), device=q.device)
        # One key more than there are takes what belongs to none.
        dk, dv = (dq.new_zeros(*k.shape[:2], keys + 1, k.shape[3]) for _ in range(2))
        for part in _parts(pattern, q_at, q.shape[2], k.shape[1], q.device):
            rows = [x[:, :, part.queries] for x in (grad_out, q, out, lse)]
            dq_part, dk_part, dv_part = _part_backward(*rows, part.gather(k), part.gather(v), part.visible, scale)
            dq[:, :, part.queries] += dq_part
            dk[part.at(keys)] += dk_part
            dv[part.at(keys)] += dv_part
        return dq, dk[:, :, :keys], dv[:, :, :keys]


BACKENDS = {"torch": Parts, "reference": Dense}


class _Part(NamedTuple):
    """Queries of a tile and some of its keys."""

    queries: slice
    keys: slice | Tensor
    """A range, or int64 ``[kv_heads, keys]``: each head's own. Those past the last query are hidden, and may not exist."""
    visible: Tensor | str | None
    """bool ``[kv_heads, queries, keys]``, "causal" (as many keys as queries), or None where all is visible."""
    adds: bool = False
    """Whether a part before it had the same queries."""

    def at(self, last: int) -> tuple:
        """Index of the keys in ``[batch, kv_heads, time, dim]``, those past ``last`` as ``last``."""
        if isinstance(self.keys, slice):
            return slice(None), slice(None), self.keys
        heads = torch.arange(len(self.keys), device=self.keys.device)[:, None]
        return slice(None), heads, self.keys.clamp(max=last)

    def gather(self, x: Tensor) -> Tensor:
        """The part's keys of ``x`` ``[batch, kv_heads, time, dim]``."""
        return x[self.at(x.shape[2] - 1)]


def _parts(pattern: Pattern, q_at: int, queries: int, kv_heads: int, device: torch.device) -> Iterator[_Part]:
    stop = q_at + queries
    if isinstance(pattern, Causal) and device.type in _FLASH_DEVICES:
        yield _Part(slice(0, queries), slice(q_at, stop), "causal")
        if q_at:
            yield _Part(slice(0, queries), slice(0, q_at), None, adds=True)
        return
    stretch = _QUERY_BLOCKS * (64 if isinstance(pattern, Causal) else pattern.block)
    for first, last in pairwise([q_at, *range(q_at - q_at % stretch + stretch, stop, stretch), stop]):
        # The heads need different keys, but equally many blocks give or take one: they go as one batch.
        keys = [
            torch.cat([blocks.positions(pattern.block, device) for blocks in pattern.need(first, last, head)])
            for head in range(kv_heads)
        ]
        keys = torch.nn.utils.rnn.pad_sequence(keys, batch_first=True, padding_value=stop)
        at = torch.arange(first, last, device=device)
        visible = torch.stack([pattern.from_head(head).mask(at, keys[head], 1)[0] for head in range(kv_heads)])
        yield _Part(slice(first - q_at, last - q_at), keys, visible)


def _merge(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over different keys as one."""
    total = torch.logaddexp(lse, new_lse)
    return (out * (lse - total).exp()[..., None] + new * (new_lse - total).exp()[..., None]).to(out.dtype), total


def _part_forward(q, k, v, visible, scale):
    """Torch's flash kernel on the CPU; elsewhere the formula in fp32."""
    if q.device.type in _FLASH_DEVICES:
        causal, mask = _cpu_mask(visible, q)
        return _FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    out, lse = _formula_forward(*(x.to(accumulation_dtype(q)) for x in (q, k, v)), visible, scale)
    return out.to(q.dtype), lse


def _part_backward(grad_out, q, out, lse, k, v, visible, scale):
    if q.device.type in _FLASH_DEVICES:
        causal, mask = _cpu_mask(visible, q)
        return _FLASH_BACKWARD(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    tensors = (x.to(accumulation_dtype(q)) for x in (grad_out, q, k, v, out, lse))
    return _formula_backward(*tensors, visible, scale)


def _cpu_mask(visible: Tensor | str | None, q: Tensor) -> tuple[bool, Tensor | None]:
    """Whether causal, and the additive mask ``[1, heads, queries, keys]``."""
    if not isinstance(visible, Tensor):
        return visible == "causal", None
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    return False, mask[:, None].expand(-1, q.shape[1] // len(visible), -1, -1).flatten(0, 1)[None]


def _formula_forward(q, k, v, visible, scale):
    p = torch.einsum("bhgqd,bhkd->bhgqk", _grouped(q, k), k) * scale
    p = p.masked_fill(~visible[:, None], -torch.inf)
    lse = p.logsumexp(-1)
    out = torch.einsum("bhgqk,bhkd->bhgqd", (p - lse[..., None]).exp(), v)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _formula_backward(grad_out, q, k, v, out, lse, visible, scale):
    """FlashAttention's backward (arXiv 2205.14135, algorithm 4), for all pairs at once."""
    grad_out, q, out, lse = (_grouped(x, k) for x in (grad_out, q, out, lse))
    p = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * scale
    p = (p.masked_fill(~visible[:, None], -torch.inf) - lse[..., None]).exp()
    dp = torch.einsum("bhgqd,bhkd->bhgqk", grad_out, v)
    ds = p * (dp - (grad_out * out).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bhgqk,bhkd->bhgqd", ds, k).flatten(1, 2)
    dk = torch.einsum("bhgqk,bhgqd->bhkd", ds, q)
    return dq, dk, torch.einsum("bhgqk,bhgqd->bhkd", p, grad_out)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``[batch, kv_heads, heads per KV head, ...]``."""
    return x.unflatten(1, (k.shape[1], -1))


def _doubles(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


# Query blocks that share one gather of keys: more of them waste work at the band's corner, fewer waste calls.
_QUERY_BLOCKS = 8

# Where torch has a flash kernel that gives the log-sum-exp and takes the final one back.
_FLASH_DEVICES = {"cpu"}
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
