"""Tiles through our Triton kernels: a small table of rules in, one launch for the rows, a few for the keys."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import triton
from torch import Tensor

from ...patterns import Pattern
from ...patterns.block_lists import BlockLists
from ...patterns.rules import Blocks, Rule
from ...triton_device import (
    INTERPRETED,
    aligned,
    chip,
    no_device,
    on_its_device,
    unit_stride,
    workspace,
)
from ..tiles import LogitOptions, Tile, merge_
from .dkv import delta_kernel, dkv_kernel, reduce_splits_kernel
from .forward_dq import forward_dq_kernel
from .launch_config import MAX_DIM, KernelConfig, shape
from .rules import NEVER

# wgmma takes tiles of 64; the interpreter anything, and is slow.
_LEAST_BLOCK = 16 if INTERPRETED else 64
_UNLIMITED = NEVER.value
# The queries of a far tile of keys are shared among so many programs at most, each with so many tiles at least.
_SPLITS, _TILES_PER_SPLIT = 8, 16


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """What it cannot do, and what can."""
    if reason := no_device(q):
        return reason
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"has no {q.dtype}; use torch"
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        return f"takes head dims up to {MAX_DIM}, not {max(q.shape[-1], v.shape[-1])}; use torch, or flash for causal and windows"
    blocks = _blocks(pattern, k.shape[2])
    if min(blocks, default=_LEAST_BLOCK) < _LEAST_BLOCK:
        return f"takes blocks of at least {_LEAST_BLOCK} tokens, but {pattern!r} has {min(blocks)}; use torch"
    return None


@on_its_device
def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_forward`."""
    triton.set_allocator(workspace)  # of this thread: autograd has its own
    q, k, v = map(unit_stride, (q, k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(
        q.shape[:3],
        -torch.inf if tile.logits.sigmoid_bias is None else 0.0,
        dtype=torch.float32,
        device=q.device,
    )
    for at, rows in _runs(tile.q_positions, consecutive=True):
        for n, (keys_at, keys) in enumerate(_runs(tile.k_positions)):
            new, new_lse = _Launch(tile, at, keys_at, q[:, rows], k[:, keys], v[:, keys]).forward()
            if n:
                merge_(out[:, rows], lse[:, rows], new, new_lse, tile.logits)
            else:
                out[:, rows], lse[:, rows] = new, new_lse
    return out, lse


@on_its_device
def backward(grad_out, q, k, v, out, lse, tile: Tile, grad_lse: Tensor | None):
    """See :func:`~longspan.attention.softmax.backends.tile_backward`."""
    triton.set_allocator(workspace)
    grad_out, q, k, v, out = map(unit_stride, (grad_out, q, k, v, out))
    delta, lse = _delta(out, grad_out, grad_lse), lse.transpose(1, 2)
    dq, dk, dv = [], {}, {}
    for at, rows in _runs(tile.q_positions, consecutive=True):
        own = (grad_out[:, rows], lse[:, :, rows].contiguous(), delta[:, :, rows].contiguous())
        of_rows = None
        for keys_at, keys in _runs(tile.k_positions):
            launch = _Launch(tile, at, keys_at, q[:, rows], k[:, keys], v[:, keys])
            of_rows = _sum(of_rows, launch.queries_gradient(*own))
            of_keys, of_values = launch.keys_gradients(*own)
            dk[keys.start], dv[keys.start] = (
                _sum(dk.get(keys.start), of_keys),
                _sum(dv.get(keys.start), of_values),
            )
        dq.append(of_rows)
    return _cat(dq, q), _cat(list(dk.values()), k), _cat(list(dv.values()), v)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _cat(parts: list[Tensor | None], like: Tensor) -> Tensor:
    """Along time, in fp32; zeros where a tile has no queries, or no keys."""
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    return (
        torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        if None in parts or not parts
        else torch.cat(parts, 1)
    )


def _runs(at: tuple[Blocks, ...], consecutive: bool = False) -> Iterator[tuple[Blocks, slice]]:
    """Each range with its rows; where ``consecutive``, cut into ranges of consecutive positions."""
    row = 0
    for blocks in at:
        cut = consecutive and blocks.step > 1
        parts = (
            [Blocks(blocks.start + n * blocks.step, 1, 1, blocks.size) for n in range(blocks.count)]
            if cut
            else [blocks]
        )
        for part in parts:
            yield part, slice(row, row + len(part))
            row += len(part)


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, queries, heads, dim = out.shape
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    dlse = delta if grad_lse is None else grad_lse.transpose(1, 2).to(torch.float32).contiguous()
    delta_kernel[triton.cdiv(queries, 64), batch * heads](
        out, grad_out, dlse, delta, *out.stride()[:3], *grad_out.stride()[:3], heads, queries,
        DV=dim, BLOCK_DV=triton.next_power_of_2(dim), BM=64, WITH_LSE=grad_lse is not None,
    )  # fmt: skip
    return delta


def _blocks(pattern: Pattern, kv_heads: int) -> list[int]:
    """Of everything in the pattern that comes in whole blocks."""
    if isinstance(pattern, BlockLists):
        return [pattern.block]
    return [rule.block for head in range(kv_heads) for rule in pattern.rules(head) if rule.step > 1]


@dataclass(frozen=True)
class _Table:
    """The rules of each KV head as the kernels read them."""

    rows: np.ndarray
    """int32 ``[kv_heads, bands + fars, columns]``."""
    bands: int
    fixed: int
    fars: int
    """Fixed rules and relative ones."""


def _rules(pattern: Pattern, kv_heads: int) -> tuple[tuple[Rule, ...], ...]:
    """Of each head; of block lists the block, as a rule that shows nothing."""
    if isinstance(pattern, BlockLists):
        return ((Rule(pattern.block, stop=0),),) * kv_heads
    return tuple(pattern.rules(head) for head in range(kv_heads))


@lru_cache(maxsize=256)
def _table(heads: tuple[tuple[Rule, ...], ...], keys: Blocks, size: int) -> _Table:
    """For key tiles of ``size``, whatever the number of ``keys``."""
    kinds = [
        [[rule for rule in rules if rule.is_band] for rules in heads],
        [
            sorted(
                (rule for rule in rules if not rule.is_band and not rule.relative),
                key=_nearest_first,
            )
            for rules in heads
        ],
        [[rule for rule in rules if rule.relative] for rules in heads],
    ]
    counts = [max(map(len, kind)) for kind in kinds]
    rows = [
        [
            _row(rule, keys, size)
            for kind, count in zip(kinds, counts, strict=True)
            for rule in _padded(kind[head], count)
        ]
        for head in range(len(heads))
    ]
    rows = np.array(rows, np.int32).reshape(len(heads), sum(counts), len(_NOTHING))
    return _Table(rows, counts[0], counts[1], sum(counts[1:]))


@lru_cache(maxsize=256)
def _table_on(device: torch.device, *key) -> Tensor:
    return torch.from_numpy(_table(*key).rows).to(device)


def _far_tiles(table: _Table, keys: Blocks, size: int) -> list[int]:
    """How many tiles of ``keys`` each far rule has, at most over the heads."""
    far = range(table.bands, table.bands + table.fars)
    return [
        max(_tiles(row, keys, size, n >= table.bands + table.fixed) for row in table.rows[:, n])
        for n in far
    ]


def _nearest_first(rule: Rule) -> tuple:
    """Rules without limit come last: the others bound what is left to them."""
    return rule.stop is None, _UNLIMITED if rule.reach is None else rule.reach * rule.block


def _padded(rules: list[Rule], count: int) -> list[Rule | None]:
    return [*rules, *[None] * (count - len(rules))]


# Shift, reach, stop, step, residue, width, first row, row step, first position, position step.
_NOTHING = (0, 0, 0, 1, 0, 1 << 16, 0, 1 << 16, 0, 1 << 16)


def _row(rule: Rule | None, keys: Blocks, size: int) -> tuple[int, ...]:
    """A row of the table."""
    if rule is None:
        return _NOTHING
    shift = rule.block.bit_length() - 1
    reach = _UNLIMITED >> shift if rule.reach is None else min(rule.reach, _UNLIMITED >> shift)
    stop = _UNLIMITED if rule.stop is None else rule.stop
    segment = (size, 0, size, 0, size) if rule.is_band else _segment(rule, keys, size)
    return (shift, reach, stop, rule.step, rule.residue, *segment) if segment else _NOTHING


def _segment(rule: Rule, keys: Blocks, size: int) -> tuple[int, ...] | None:
    """Width, first row, row step, first position and position step of a far rule's runs; None where it has none."""
    if keys.step == 1:
        first = keys.start * keys.size
        if rule.step == 1:  # the first tokens, tile by tile
            return size, -(first % size), size, first - first % size, size
        at, step = (0 if rule.relative else rule.residue * rule.block), rule.step * rule.block
        return rule.block, at - first, step, at, step
    if rule.step == 1:
        return keys.size, 0, keys.size, keys.start * keys.size, keys.step * keys.size
    if rule.relative or rule.block != keys.size:
        raise ValueError(
            f"backend triton takes keys in blocks of {keys.size} for stripes of the same blocks, not for {rule}"
        )
    # Every step-th block of those whose index in the run solves start + n * keys.step = residue (mod step).
    for n in range(rule.step // np.gcd(rule.step, keys.step)):
        if (keys.start + n * keys.step - rule.residue) % rule.step == 0:
            skip = rule.step // np.gcd(rule.step, keys.step)
            at, at_step = (keys.start + n * keys.step) * keys.size, skip * keys.step * keys.size
            return keys.size, n * keys.size, skip * keys.size, at, at_step
    return None


def _tiles(row: np.ndarray, keys: Blocks, size: int, relative: bool) -> int:
    stop, width, first, step, at, at_step = (int(row[n]) for n in (2, 5, 6, 7, 8, 9))
    if stop == 0:
        return 0
    if relative:
        return triton.cdiv(keys.start * keys.size % width + len(keys), width) * (width // size)
    runs = min(
        triton.cdiv(max(0, len(keys) - first), step), triton.cdiv(max(0, stop - at), at_step)
    )
    return runs * (width // size)


class _Launch:
    """The kernels' launches for consecutive queries and one range of keys."""

    def __init__(self, tile: Tile, queries: Blocks, keys: Blocks, q: Tensor, k: Tensor, v: Tensor):
        self.pattern, self.logits, self.q, self.k, self.v = tile.pattern, tile.logits, q, k, v
        self.q_start, self.keys = queries.start * queries.size, keys
        self.group = q.shape[2] // k.shape[2]
        if isinstance(self.pattern, BlockLists) and (
            keys.step > 1 or keys.start * keys.size % self.pattern.block
        ):
            raise ValueError(
                "backend triton takes BlockLists with consecutive keys from the edge of a block on; use torch"
            )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output, and log-sum-exp ``[batch, queries, heads]``."""
        out = self.q.new_empty(*self.q.shape[:3], self.v.shape[3])
        lse = torch.empty(
            self.q.shape[0],
            self.q.shape[2],
            self.q.shape[1],
            dtype=torch.float32,
            device=self.q.device,
        )
        self._rows("forward", out, lse, None, None)
        return out, lse.transpose(1, 2)

    def queries_gradient(self, grad_out: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        """In fp32; ``lse`` and ``delta`` are ``[batch, heads, queries]``."""
        dq = torch.empty(self.q.shape, dtype=torch.float32, device=self.q.device)
        self._rows("dq", dq, lse, grad_out, delta)
        return dq

    def keys_gradients(self, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """In fp32: what the bands show in one launch, and what each far rule shows beyond them added by another."""
        size = self._sizes("dkv")
        table = self._table(size.keys)
        batch, rows, kv_heads, _ = self.k.shape
        fresh = torch.empty if table.bands or self._listed else torch.zeros
        dk, dv = (fresh(x.shape, dtype=torch.float32, device=x.device) for x in (self.k, self.v))
        if table.bands or self._listed:
            self._keys(grad_out, lse, delta, dk, dv, -1, triton.cdiv(rows, size.keys), 1)
        for far, tiles in enumerate(_far_tiles(table, self.keys, size.keys)):
            if not tiles:
                continue
            # The parts take no more memory than fp32 keys do.
            splits = min(
                _SPLITS,
                self.q.shape[1] // (size.queries * _TILES_PER_SPLIT),
                rows // (tiles * size.keys),
            )
            splits = max(1, splits)
            parts = [
                torch.empty(
                    splits * batch,
                    kv_heads,
                    tiles * size.keys,
                    x.shape[3],
                    dtype=torch.float32,
                    device=x.device,
                )
                for x in (dk, dv)
            ]
            self._keys(
                grad_out, lse, delta, *(x.transpose(1, 2) for x in parts), far, tiles, splits
            )
            for part, out in zip(parts, (dk, dv), strict=True):
                strides = (part.stride(0), part.stride(2), part.stride(1), *out.stride()[:3])
                reduce_splits_kernel[tiles, batch * kv_heads](
                    part, out, self._on_device(size.keys), *strides, kv_heads, batch, self._key_range[0], rows, splits,
                    D=out.shape[3], BLOCK_D=_block_d(out), BN=size.keys, RULES=table.bands + table.fars,
                    RULE=table.bands + far, RELATIVE=far >= table.fixed,
                )  # fmt: skip
        return dk, dv

    @property
    def _listed(self) -> bool:
        return isinstance(self.pattern, BlockLists)

    @property
    def _key_range(self) -> tuple[int, int, int, int]:
        """First block, step and size of the keys' blocks, where consecutive keys are blocks of one; and how many keys."""
        keys = self.keys
        return (
            (keys.start * keys.size, 1, 1, len(keys))
            if keys.step == 1
            else (keys.start, keys.step, keys.size, len(keys))
        )

    def _sizes(self, kernel: str) -> KernelConfig:
        """The launch shape, with tiles no larger than the blocks that a tile must lie in."""
        found = shape(
            kernel,
            chip(self.q.device),
            self.q.element_size(),
            max(_block_d(self.q), _block_d(self.v)),
        )
        blocks = _blocks(self.pattern, self.k.shape[2]) + (
            [self.keys.size] if self.keys.step > 1 else []
        )
        one_block = self._listed or any(
            rule.relative
            for head in range(self.k.shape[2])
            for rule in ([] if self._listed else self.pattern.rules(head))
        )
        queries = min([found.queries, *blocks]) if one_block else found.queries
        return replace(found, queries=queries, keys=min([found.keys, *blocks]))

    def _table(self, size: int) -> _Table:
        table = _table(*self._key(size))
        return replace(table, bands=0, fixed=0, fars=0) if self._listed else table

    def _on_device(self, size: int) -> Tensor:
        return _table_on(self.q.device, *self._key(size))

    def _key(self, size: int) -> tuple:
        return (
            _rules(self.pattern, self.k.shape[2]),
            replace(self.keys, count=1 if self.keys.step == 1 else self.keys.count),
            size,
        )

    def _options(self, size: KernelConfig, *gradients: Tensor) -> dict:
        table = self._table(size.keys)
        bulk = (
            chip(self.q.device) >= 90
            and self.q.dtype != torch.float32
            and aligned(self.q, self.k, self.v, *gradients)
        )
        return {
            "D": self.q.shape[3], "DV": self.v.shape[3], "BLOCK_D": _block_d(self.q), "BLOCK_DV": _block_d(self.v),
            "BM": size.queries, "BN": size.keys, "BANDS": table.bands, "FIXED": table.fixed, "FARS": table.fars,
            "LISTED": self._listed, "SOFTCAP": self.logits.softcap is not None, "SIGMOID": self.logits.sigmoid_bias is not None,
            "TMA": bulk, "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "num_warps": size.warps, "num_stages": size.stages,
        }  # fmt: skip

    @property
    def _scales(self) -> tuple[float, float, float]:
        return self.logits.scale, self.logits.softcap or 0.0, self.logits.sigmoid_bias or 0.0

    def _rows(
        self, kernel: str, out: Tensor, lse: Tensor, grad_out: Tensor | None, delta: Tensor | None
    ) -> None:
        size, heads = self._sizes(kernel), self.q.shape[2]
        lists, list_strides = lse, (0, 0, 0)
        if self._listed:
            lists = _forward_lists(self.pattern.of_heads(self.k.shape[2]).to(self.q.device))
            list_strides = (lists.stride(0) if lists.shape[0] > 1 else 0, *lists.stride()[1:3])
        grad = out if grad_out is None else grad_out
        tiles = triton.cdiv(self.q_start % size.queries + self.q.shape[1], size.queries)
        forward_dq_kernel[tiles, self.q.shape[0] * heads](
            self.q, self.k, self.v, out, lse, grad, lse if delta is None else delta, self._on_device(size.keys), lists,
            *self._scales, *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *out.stride()[:3],
            *grad.stride()[:3], *list_strides, heads, self.group, self.q_start, self.q.shape[1], *self._key_range,
            GRAD=kernel == "dq", **self._options(size, grad),
        )  # fmt: skip

    def _keys(
        self, grad_out, lse, delta, dk: Tensor, dv: Tensor, far: int, tiles: int, splits: int
    ) -> None:
        size, kv_heads = self._sizes("dkv"), self.k.shape[2]
        pointers = lists = lse
        list_strides = (0, 0)
        if self._listed:
            own = self.pattern.of_heads(kv_heads).to(self.q.device)
            blocks = (self._key_range[0] + self._key_range[3] - 1) // self.pattern.block + 1
            pointers, lists = _transposed(own, blocks)
            list_strides = (kv_heads * blocks if own.shape[0] > 1 else 0, blocks)
        dkv_kernel[tiles * splits, self.k.shape[0] * kv_heads](
            self.q, self.k, self.v, lse, grad_out, delta, dk, dv, self._on_device(size.keys), pointers, lists,
            *self._scales, *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *grad_out.stride()[:3],
            *dk.stride()[:3], *dv.stride()[:3], *list_strides,
            kv_heads, self.group, self.q_start, self.q.shape[1], *self._key_range, splits,
            FAR=far, **self._options(size, grad_out),
        )  # fmt: skip


def _block_d(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[3]))


def _forward_lists(lists: Tensor) -> Tensor:
    """For each query block how many blocks it sees, and which: int32; the lists ascend, so that those ahead come last."""
    own = torch.arange(lists.shape[2], device=lists.device)[:, None]
    count = ((lists >= 0) & (lists <= own)).sum(-1, keepdim=True)
    return torch.cat([count, lists], -1).to(torch.int32).contiguous()


def _transposed(lists: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that see it, ascending: where each begins, and all of them. Made on the device."""
    batch, heads, query_blocks, width = lists.shape
    queries = torch.arange(query_blocks, device=lists.device)[:, None]
    row = torch.arange(batch * heads, device=lists.device).view(batch, heads, 1, 1) * key_blocks
    shown = (lists >= 0) & (lists <= queries) & (lists < key_blocks)
    keys = torch.where(shown, row + lists, batch * heads * key_blocks).flatten()
    keys, order = keys.sort(stable=True)
    begin = torch.searchsorted(
        keys, torch.arange(batch * heads * key_blocks + 1, device=lists.device)
    )
    return begin.to(torch.int32), queries.expand(batch, heads, -1, width).flatten()[order].to(
        torch.int32
    )
