"""Tiles by flash-attn, version 2 or 4, or by torch's copy of version 2, on CUDA.

They compute causal attention and windows of tokens, and align their masks at the bottom right: of
``n`` queries and ``m`` keys, query ``r`` sees key ``c`` if ``c <= r + m - n``, and under a window
of ``left`` also ``c >= r + m - n - left``. That is our mask if the last query is at the position of
the last key, or if all keys come before all queries. :func:`split_into_calls` cuts a tile into such
parts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from ..arguments import accumulation_dtype, with_dense_heads
from ..gpu import compute_capability, torch_has_flash
from ..patterns import Blocks, ClosedFormPattern, Pattern, Rule
from .tiles import LogitOptions, Tile

_DEVICES = {"cuda"}
_DTYPES = {torch.float16, torch.bfloat16}
_MAX_HEAD_DIM = 256
_PATTERNS = "supports only causal attention and windows of tokens, the same for all heads"


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """Return why no library can compute the call exactly, or None if one can."""
    if _single_band(pattern, k.shape[2]) is None:
        return f"{_PATTERNS}, but pattern is {pattern!r}; use triton or torch"
    if not logits.is_softmax:
        return "supports only softmax, but sigmoid_bias is given; use triton or torch"
    if q.dtype not in _DTYPES:
        return f"supports only float16 and bfloat16, but q is {q.dtype}; use torch"
    if max(q.shape[3], v.shape[3]) > _MAX_HEAD_DIM:
        return (
            f"supports head dims up to {_MAX_HEAD_DIM}, but q has {q.shape[3]} and v {v.shape[3]}; "
            "use torch"
        )
    if q.device.type not in _DEVICES:
        return f"needs CUDA, but q is on {q.device}; use torch"
    try:
        _library_for(q, v, logits)
    except ImportError as error:
        return (
            f"needs flash-attn, which pip builds from source: pip install flash-attn ({error}); "
            "use torch"
        )
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_forward`."""
    library = _library_for(q, v, tile.logits)
    value_dim = v.shape[3]
    out = q.new_zeros(*q.shape[:3], value_dim)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q), device=q.device)

    q, k, v = _pad_head_dim(library, q, k, v)
    for call in split_into_calls(tile, k.shape[2]):
        call_out, call_lse = library.forward(
            q[:, call.queries], k[:, call.keys], v[:, call.keys], tile.logits, call
        )
        out[:, call.queries] = call_out[..., :value_dim]
        lse[:, call.queries] = call_lse.transpose(1, 2)  # [batch, queries, heads]
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_backward`."""
    library = _library_for(q, v, tile.logits)
    dtype = accumulation_dtype(q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))

    grad_out = grad_out.to(q.dtype)
    out = out.to(q.dtype)
    grad_out, q, k, v, out = _pad_head_dim(library, grad_out, q, k, v, out)
    for call in split_into_calls(tile, k.shape[2]):
        call_dq, call_dk, call_dv = library.backward(
            grad_out[:, call.queries],
            q[:, call.queries],
            k[:, call.keys],
            v[:, call.keys],
            out[:, call.queries],
            _heads_first(lse[:, call.queries]),
            None if grad_lse is None else grad_lse[:, call.queries],
            tile.logits,
            call,
        )
        dq[:, call.queries] += call_dq[..., : dq.shape[3]]
        dk[:, call.keys] += call_dk[..., : dk.shape[3]]
        dv[:, call.keys] += call_dv[..., : dv.shape[3]]
    return dq, dk, dv


class FlashCall(NamedTuple):
    """The part of a tile that one call of the library computes."""

    queries: slice
    """Tokens of the tile's queries."""
    keys: slice
    """Tokens of the tile's keys."""
    causal: bool
    """True if the last query is at the last key; otherwise all keys come before all queries."""
    left: int | None
    """How far before the bottom right diagonal a query sees; None for any distance."""


def split_into_calls(tile: Tile, kv_heads: int) -> Iterator[FlashCall]:
    """Cut a tile into calls. Each query is in at most one; those in none see nothing.

    First come the queries among the keys. Later queries see all keys up to a window's length after
    the first key, and then ever fewer. These are two calls, because flash-attn 2 treats an open
    right end as one that is as wide as the keys, which hides some of them in a windowed call with
    many more queries than keys.
    """
    band = _single_band(tile.pattern, kv_heads)
    if band is None:
        raise ValueError(f"backend flash {_PATTERNS}, but pattern is {tile.pattern!r}")
    q_start, q_stop = _contiguous_positions("queries", tile.q_positions)
    k_start, k_stop = _contiguous_positions("keys", tile.k_positions)
    reach = q_stop if band.reach is None else min(band.reach, q_stop)

    # Queries among the keys; those that see all keys; those that have left some keys behind.
    first_key_leaves = max(k_stop, k_start + reach)
    last_key_leaves = k_stop + reach - 1
    for first, last in pairwise((k_start, k_stop, first_key_leaves, last_key_leaves)):
        query_start = max(first, q_start)
        query_stop = min(last, q_stop)
        key_start = max(k_start, query_start - reach + 1)
        key_stop = min(k_stop, query_stop)
        if query_start >= query_stop or key_start >= key_stop:
            continue

        left = None
        window_hides_keys = key_start < query_stop - reach
        if window_hides_keys:
            # The library measures from the last key, which may be before the last query.
            left = reach - 1 - (query_stop - key_stop)
        yield FlashCall(
            slice(query_start - q_start, query_stop - q_start),
            slice(key_start - k_start, key_stop - k_start),
            causal=query_stop == key_stop,
            left=left,
        )


def _single_band(pattern: Pattern, kv_heads: int) -> Rule | None:
    """Return the one rule of all heads if it is a band of tokens, else None."""
    if not isinstance(pattern, ClosedFormPattern):
        return None
    rules_of_heads = {pattern.rules(head) for head in range(kv_heads)}
    if len(rules_of_heads) != 1:
        return None
    (rules,) = rules_of_heads
    if len(rules) != 1:
        return None
    (rule,) = rules
    counts_tokens = rule.block == 1 or rule.reach is None
    return rule if rule.is_band and counts_tokens else None


def _contiguous_positions(name: str, ranges: tuple[Blocks, ...]) -> tuple[int, int]:
    """Return the first position and the one after the last; ValueError if there are gaps."""
    has_steps = any(not blocks.is_contiguous and blocks.count > 1 for blocks in ranges)
    edges = [
        (blocks.first_position, (blocks.start + blocks.count) * blocks.size)
        for blocks in ranges
        if blocks.count
    ]
    has_gaps = any(left[1] != right[0] for left, right in pairwise(edges))
    if has_steps or has_gaps:
        raise ValueError(
            f"backend flash needs {name} at consecutive positions, got {ranges}; "
            "use triton or torch"
        )
    if not edges:
        return 0, 0
    return edges[0][0], edges[-1][1]


class _Library(ABC):
    """What computes a call: tensors are ``[batch, time, heads, dim]``, with one dim for all."""

    @abstractmethod
    def padded_head_dim(self, dim: int) -> int:
        """Return the head dim that the library has for one of ``dim``."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, logits: LogitOptions, call: FlashCall
    ) -> tuple[Tensor, Tensor]:
        """Return the output, and the log-sum-exp ``[batch, heads, queries]`` in fp32."""

    @abstractmethod
    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
        logits: LogitOptions,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, from the final ``out`` and ``lse``."""


class _Version2(_Library):
    """flash-attn 2, which has a head dim that is a multiple of 8, and no gradient of ``lse``."""

    def padded_head_dim(self, dim: int) -> int:
        return -(-dim // 8) * 8

    @abstractmethod
    def _gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        logits: LogitOptions,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
        logits: LogitOptions,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self._gradients(grad_out, q, k, v, out, lse, logits, call)
        if grad_lse is not None:
            # The library has no argument for this gradient. A key's weight p moves lse by p: as if
            # each value had one more entry, 1, that the output does not show. A call of its own
            # has room for that entry even if the head dim is the largest.
            lse_grad_out = grad_out.new_zeros(grad_out.shape)
            lse_v = v.new_zeros(v.shape)
            lse_grad_out[..., 0] = grad_lse
            lse_v[..., 0] = 1.0
            no_out = out.new_zeros(out.shape)
            lse_dq, lse_dk, _ = self._gradients(
                lse_grad_out, q, k, lse_v, no_out, lse, logits, call
            )
            dq = dq.to(lse.dtype) + lse_dq
            dk = dk.to(lse.dtype) + lse_dk
        return dq, dk, dv


@dataclass(frozen=True)
class _Flash2(_Version2):
    """The package flash-attn, version 2. A window has -1 for an open end."""

    interface: ModuleType

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, logits: LogitOptions, call: FlashCall
    ) -> tuple[Tensor, Tensor]:
        options = self._options(logits, call)
        out, lse, *_ = self.interface._wrapped_flash_attn_forward(
            q, k, v, **options, return_softmax=False
        )
        return out, lse

    def _gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        logits: LogitOptions,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        options = self._options(logits, call) | {"deterministic": True}
        self.interface._wrapped_flash_attn_backward(
            grad_out, q, k, v, out, lse, dq, dk, dv, **options
        )
        return dq, dk, dv

    @staticmethod
    def _options(logits: LogitOptions, call: FlashCall) -> dict[str, Any]:
        return {
            "causal": call.causal,
            "window_size_left": -1 if call.left is None else call.left,
            "window_size_right": 0 if call.causal else -1,
            "dropout_p": 0.0,
            "softmax_scale": logits.scale,
            "softcap": logits.softcap or 0.0,
            "alibi_slopes": None,
        }


@dataclass(frozen=True)
class _TorchFlash(_Version2):
    """torch's own build of flash-attn 2, which has no softcap. An open end is None."""

    operators = torch.ops.aten

    def padded_head_dim(self, dim: int) -> int:
        # It has no gradients for the head dims between on GPUs with little shared memory.
        return 256 if dim > 192 else super().padded_head_dim(dim)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, logits: LogitOptions, call: FlashCall
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.operators._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, call.causal, False,
            **self._options(logits, call),
        )  # fmt: skip
        return out, lse

    def _gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        logits: LogitOptions,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Only dropout reads the state of random numbers.
        random_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        with _deterministic():
            return self.operators._flash_attention_backward(
                grad_out, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, call.causal,
                random_state, random_state[:0], **self._options(logits, call),
            )  # fmt: skip

    @staticmethod
    def _options(logits: LogitOptions, call: FlashCall) -> dict[str, Any]:
        return {
            "scale": logits.scale,
            "window_size_left": call.left,
            "window_size_right": 0 if call.causal else None,
        }


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let torch's kernels add in a fixed order, as they do only where that is asked for."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Flash4(_Library):
    """flash-attn 4, whose gradients are wrong for head dims between multiples of 32.

    A window has None for an open end; -1 would hide keys.
    """

    interface: ModuleType

    def padded_head_dim(self, dim: int) -> int:
        return -(-dim // 32) * 32

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, logits: LogitOptions, call: FlashCall
    ) -> tuple[Tensor, Tensor]:
        options = self._options(logits, call)
        out, lse, *_ = self.interface._flash_attn_fwd(q, k, v, **options, return_lse=True)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
        logits: LogitOptions,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = self._options(logits, call) | {"deterministic": True}
        if grad_lse is not None:
            options["dlse"] = _heads_first(grad_lse.to(lse.dtype))
        return self.interface._flash_attn_bwd(q, k, v, out, grad_out, lse, **options)

    @staticmethod
    def _options(logits: LogitOptions, call: FlashCall) -> dict[str, Any]:
        return {
            "causal": call.causal,
            "window_size_left": call.left,
            "window_size_right": 0 if call.causal else None,
            "softmax_scale": logits.scale,
        }


def _library_for(q: Tensor, v: Tensor, logits: LogitOptions) -> _Library:
    """Return version 4 if its own tests cover both passes, else version 2, else torch's own.

    They do not cover the gradients of head dims above 128. Those of a softcap were reported to hang
    (its issue 2466), and beyond compute capability 11 none are deterministic.

    Raises:
        ImportError: if no version is installed that can do this, or it is too old.
    """
    is_tested = logits.softcap is None and max(q.shape[3], v.shape[3]) <= 128
    generation = compute_capability(q.device) // 10
    library = _installed_library(prefer_version_4=is_tested and generation in (9, 10, 11))
    if isinstance(library, _Library):
        return library
    if logits.softcap is None and generation >= 8 and torch_has_flash():
        return _TorchFlash()
    raise ImportError(library)


@cache
def _installed_library(prefer_version_4: bool) -> _Library | str:
    """Return the package's version to use, or why there is none.

    Both are kept: every call of attention asks, and looking for a package takes milliseconds.
    """
    if prefer_version_4:
        with suppress(ImportError):
            # Earlier versions had races in the gradients, sums in no fixed order, and overflows
            # from four million keys on.
            interface = _import_interface("flash-attn-4", "4.0.0b26", "flash_attn.cute.interface")
            return _Flash4(interface)
    try:
        return _Flash2(_import_interface("flash-attn", "2.7.0", "flash_attn.flash_attn_interface"))
    except ImportError as error:
        return str(error)


def _import_interface(package: str, minimum: str, module: str) -> ModuleType:
    installed = version(package)
    if Version(installed) < Version(minimum):
        raise ImportError(f"{package} is {installed}, must be at least {minimum}")
    return import_module(module)


def _pad_head_dim(library: _Library, *tensors: Tensor) -> list[Tensor]:
    """Return tensors with dense heads, padded with zeros to one dim that the library has.

    Zeros added to the entries of keys or values change nothing.
    """
    dim = library.padded_head_dim(max(x.shape[3] for x in tensors))
    padded = [F.pad(x, (0, dim - x.shape[3])) if x.shape[3] < dim else x for x in tensors]
    return [with_dense_heads(x) for x in padded]


def _heads_first(x: Tensor) -> Tensor:
    """Return ``[batch, heads, queries]``, contiguous: the libraries ignore its strides."""
    return x.transpose(1, 2).contiguous()
