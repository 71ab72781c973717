"""Tiles through flash-attn, version 2 or 4, on CUDA: causal attention and windows of tokens.

Both align their masks at the bottom right: of ``n`` queries and ``m`` keys, query ``r`` sees key ``c`` where
``c <= r + m - n``, and under a window of ``left`` also ``c >= r + m - n - left``. That is ours wherever the last query stands
at the last key, or behind all keys; :func:`calls` cuts a tile into such parts.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from ..arguments import accumulation_dtype
from ..patterns import ClosedFormPattern, Pattern
from ..patterns.rules import Blocks, Rule
from .tiles import LogitOptions, Tile

_DEVICES = {"cuda"}
_DTYPES = {torch.float16, torch.bfloat16}
_MAX_DIM = 256


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """Why it cannot do this exactly, if so."""
    if _band(pattern, k.shape[2]) is None:
        return f"{_PATTERNS}, but pattern is {pattern!r}; use triton or torch"
    if logits.sigmoid_bias is not None:
        return "does softmax alone, but sigmoid_bias is given; use triton or torch"
    if q.dtype not in _DTYPES:
        return f"does float16 and bfloat16, but q is {q.dtype}; use torch"
    if _dim(q, v) > _MAX_DIM:
        return (
            f"does heads of up to {_MAX_DIM}, but q has {q.shape[3]} and v {v.shape[3]}; use torch"
        )
    if q.device.type not in _DEVICES:
        return f"needs CUDA, but q is on {q.device}; use torch"
    try:
        _flash(q, v, logits)
    except ImportError as error:
        return f"needs a package: pip install 'longspan[gpu]' ({error})"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_forward`."""
    flash, logits = _flash(q, v, tile.logits), tile.logits
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q), device=q.device)
    q, k, v = _padded(_dim(q, v, flash.multiple), q, k, v)
    for call in calls(tile, k.shape[2]):
        queries, keys, *_ = call
        new, new_lse = flash.forward(q[:, queries], k[:, keys], v[:, keys], logits, call)
        out[:, queries], lse[:, queries] = new[..., : out.shape[3]], new_lse.transpose(1, 2)
    return out, lse


def backward(grad_out, q, k, v, out, lse, tile: Tile, grad_lse: Tensor | None):
    """See :func:`~longspan.attention.softmax.backends.tile_backward`."""
    flash, logits = _flash(q, v, tile.logits), tile.logits
    gradients = [
        torch.zeros(x.shape, dtype=accumulation_dtype(q), device=q.device) for x in (q, k, v)
    ]
    grad_out, out = grad_out.to(q.dtype), out.to(q.dtype)
    grad_out, q, k, v, out = _padded(_dim(q, v, flash.multiple), grad_out, q, k, v, out)
    for call in calls(tile, k.shape[2]):
        queries, keys, *_ = call
        parts = (
            grad_out[:, queries],
            q[:, queries],
            k[:, keys],
            v[:, keys],
            out[:, queries],
            _heads_first(lse[:, queries]),
        )
        found = flash.backward(
            *parts, None if grad_lse is None else grad_lse[:, queries], logits, call
        )
        for gradient, rows, new in zip(gradients, (queries, keys, keys), found, strict=True):
            gradient[:, rows] += new[..., : gradient.shape[3]]
    return tuple(gradients)


class Call(NamedTuple):
    """A part of a tile that one call does, by its rows there."""

    queries: slice
    keys: slice
    causal: bool
    """Whether the last query stands at the last key; else all keys are behind all queries."""
    left: int | None
    """How far before the bottom right diagonal a query sees; None for any distance."""


def calls(tile: Tile, kv_heads: int) -> Iterator[Call]:
    """What makes up a tile, each query in at most one of them; those in none see nothing.

    First the queries among the keys. Those after the last key see all of them up to a window's length after the first, then
    ever fewer: two parts, because flash-attn 2 takes an open right end for one as wide as the keys, which hides some where
    the queries of a windowed call are many more.
    """
    rule = _band(tile.pattern, kv_heads)
    if rule is None:
        raise ValueError(f"backend flash {_PATTERNS}, but pattern is {tile.pattern!r}")
    (q_start, q_stop), (k_start, k_stop) = (
        _run("q_at", tile.q_positions),
        _run("k_at", tile.k_positions),
    )
    reach = q_stop if rule.reach is None else min(rule.reach, q_stop)
    thinning = max(k_stop, k_start + reach)
    for first, last in pairwise((k_start, k_stop, thinning, k_stop + reach - 1)):
        start, stop = max(first, q_start), min(last, q_stop)
        seen, end = max(k_start, start - reach + 1), min(k_stop, stop)
        if start < stop and seen < end:
            cut = seen < stop - reach
            left = reach - 1 - (stop - end) if cut else None
            yield Call(
                slice(start - q_start, stop - q_start),
                slice(seen - k_start, end - k_start),
                stop == end,
                left,
            )


_PATTERNS = "does causal attention and windows of tokens, the same for all heads"


def _band(pattern: Pattern, kv_heads: int) -> Rule | None:
    """The one rule of all heads, where it is a band of tokens."""
    rules = (
        {pattern.rules(head) for head in range(kv_heads)}
        if isinstance(pattern, ClosedFormPattern)
        else ()
    )
    if len(rules) != 1:
        return None
    (only,) = rules
    band = len(only) == 1 and only[0].is_band and (only[0].block == 1 or only[0].reach is None)
    return only[0] if band else None


def _run(name: str, at: tuple[Blocks, ...]) -> tuple[int, int]:
    """The first position and the one after the last, of rows that are one run of positions."""
    runs = [
        (blocks.start * blocks.size, (blocks.start + blocks.count) * blocks.size)
        for blocks in at
        if blocks.count
    ]
    strided = any(blocks.step > 1 and blocks.count > 1 for blocks in at)
    if strided or any(a[1] != b[0] for a, b in pairwise(runs)):
        raise ValueError(
            f"backend flash takes one run of positions as {name}, got {at}; use triton or torch"
        )
    return (runs[0][0], runs[-1][1]) if runs else (0, 0)


@dataclass(frozen=True)
class _Flash2:
    """flash-attn 2: the same head dim for all, a multiple of 8; -1 for an open end of the window."""

    interface: ModuleType
    multiple = 8

    def forward(self, q, k, v, logits: LogitOptions, call: Call):
        options = self._options(logits, call)
        return self.interface._wrapped_flash_attn_forward(q, k, v, **options, return_softmax=False)[
            :2
        ]

    def backward(self, grad_out, q, k, v, out, lse, grad_lse, logits: LogitOptions, call: Call):
        def run(grad_out, v, out):
            gradients = [
                torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
            ]
            options = self._options(logits, call) | {"deterministic": True}
            self.interface._wrapped_flash_attn_backward(
                grad_out, q, k, v, out, lse, *gradients, **options
            )
            return gradients

        dq, dk, dv = run(grad_out, v, out)
        if grad_lse is not None:
            # It has no place for this gradient. A key's weight p moves lse by p: as if each value had one more entry, 1,
            # which the output does not show. A call of its own holds it even where the head dim is the largest.
            own = [x.new_zeros(x.shape) for x in (grad_out, v, out)]
            own[0][..., 0], own[1][..., 0] = grad_lse, 1.0
            lse_dq, lse_dk, _ = run(*own)
            dq, dk = dq.to(lse.dtype) + lse_dq, dk.to(lse.dtype) + lse_dk
        return dq, dk, dv

    @staticmethod
    def _options(logits: LogitOptions, call: Call) -> dict:
        left, right = -1 if call.left is None else call.left, 0 if call.causal else -1
        window = {"causal": call.causal, "window_size_left": left, "window_size_right": right}
        return window | {
            "dropout_p": 0.0,
            "softmax_scale": logits.scale,
            "softcap": logits.softcap or 0.0,
            "alibi_slopes": None,
        }


@dataclass(frozen=True)
class _Flash4:
    """flash-attn 4: None for an open end (-1 hides keys). Its gradients are wrong for head dims between multiples of 32."""

    interface: ModuleType
    multiple = 32

    def forward(self, q, k, v, logits: LogitOptions, call: Call):
        return self.interface._flash_attn_fwd(
            q, k, v, **self._options(logits, call), return_lse=True
        )[:2]

    def backward(self, grad_out, q, k, v, out, lse, grad_lse, logits: LogitOptions, call: Call):
        options = self._options(logits, call) | {"deterministic": True}
        if grad_lse is not None:
            options["dlse"] = _heads_first(grad_lse.to(lse.dtype))
        return self.interface._flash_attn_bwd(q, k, v, out, grad_out, lse, **options)

    @staticmethod
    def _options(logits: LogitOptions, call: Call) -> dict:
        right = 0 if call.causal else None
        window = {"causal": call.causal, "window_size_left": call.left, "window_size_right": right}
        return window | {"softmax_scale": logits.scale}


def _flash(q: Tensor, v: Tensor, logits: LogitOptions) -> _Flash2 | _Flash4:
    """Version 4 where its own tests cover both passes, else 2; ImportError where neither will do.

    They do not cover the gradients of head dims above 128; those of a softcap were reported to hang (its issue 2466), and
    beyond compute capability 11 none are deterministic.
    """
    trusted = logits.softcap is None and _dim(q, v) <= 128
    return _installed(trusted and torch.cuda.get_device_capability(q.device)[0] in (9, 10, 11))


@cache
def _installed(prefer4: bool) -> _Flash2 | _Flash4:
    if prefer4:
        with suppress(ImportError):
            # Before, there were races in the gradients, sums in no fixed order, and overflows from four million keys on.
            return _Flash4(_interface("flash-attn-4", "4.0.0b26", "flash_attn.cute.interface"))
    return _Flash2(_interface("flash-attn", "2.7.0", "flash_attn.flash_attn_interface"))


def _interface(package: str, least: str, module: str) -> ModuleType:
    found = version(package)
    if Version(found) < Version(least):
        raise ImportError(f"{package} is {found}, must be at least {least}")
    return import_module(module)


def _dim(q: Tensor, v: Tensor, multiple: int = 1) -> int:
    """The head dim that holds those of queries and values."""
    return -(-max(q.shape[3], v.shape[3]) // multiple) * multiple


def _padded(dim: int, *tensors: Tensor) -> list[Tensor]:
    """Zeros added to the entries of keys or values change nothing."""
    return [F.pad(x, (0, dim - x.shape[3])) if x.shape[3] < dim else x for x in tensors]


def _heads_first(x: Tensor) -> Tensor:
    """``[batch, heads, queries]``; they read its memory without a look at its strides."""
    return x.transpose(1, 2).contiguous()
