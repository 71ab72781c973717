"""Tiles by our Triton kernels, which read the pattern as a small table of rules.

One launch for the queries, and a few for the keys: one for the bands, and one for each far rule.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ...arguments import with_dense_heads
from ...patterns import Blocks, ClosedFormPattern, Pattern, Rule
from ...patterns.block_lists import BlockLists
from ...patterns.token_lists import TokenLists
from ...triton_device import (
    INTERPRETED,
    allocate_workspace,
    compute_capability,
    device_unsupported_reason,
    fits_bulk_copies,
    has_bulk_copies,
    on_device_of_first_argument,
)
from ..tiles import LogitOptions, Tile, merge_
from .dkv import delta_kernel, dkv_kernel, reduce_splits_kernel
from .forward_dq import forward_dq_kernel
from .launch_config import MAX_HEAD_DIM, KernelConfig, kernel_config
from .rules import UNLIMITED

_MIN_BLOCK = 16 if INTERPRETED else 64
"""The smallest block of a pattern: wgmma multiplies tiles of 64; the interpreter accepts less."""
_UNLIMITED: int = UNLIMITED.value
_MAX_SPLITS = 8
"""The queries of a far tile of keys are shared among at most this many programs."""
_MIN_TILES_PER_SPLIT = 16
"""Each of these programs has at least this many tiles of queries, if all of them see the keys."""


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """Return why the kernels cannot compute the call, and what can; None if they can."""
    if reason := device_unsupported_reason(q):
        return reason
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"does not support {q.dtype}; use torch"
    if isinstance(pattern, TokenLists):
        return "has no kernel for keys that each query chooses; use torch"
    head_dim = max(q.shape[-1], v.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        return (
            f"supports head dims up to {MAX_HEAD_DIM}, not {head_dim}; "
            "use torch, or flash for causal and windows"
        )
    smallest_block = min(_pattern_blocks(pattern, k.shape[2]), default=_MIN_BLOCK)
    if smallest_block < _MIN_BLOCK:
        return (
            f"needs blocks of at least {_MIN_BLOCK} tokens, but {pattern!r} has {smallest_block}; "
            "use torch"
        )
    return None


@on_device_of_first_argument
def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_forward`."""
    triton.set_allocator(allocate_workspace)  # of this thread: autograd has its own
    q, k, v = map(with_dense_heads, (q, k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(
        q.shape[:3], tile.logits.lse_without_keys, dtype=torch.float32, device=q.device
    )
    for queries in _contiguous_ranges(tile.q_positions):
        place = (slice(None), queries.tokens)
        for index, keys in enumerate(_ranges(tile.k_positions)):
            launch = _Launch(
                tile,
                queries.positions,
                keys.positions,
                q[place],
                k[:, keys.tokens],
                v[:, keys.tokens],
            )
            new_out, new_lse = launch.forward()
            if index == 0:
                out[place] = new_out
                lse[place] = new_lse
            else:
                merge_(out[place], lse[place], new_out, new_lse, tile.logits)
    return out, lse


@on_device_of_first_argument
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
    triton.set_allocator(allocate_workspace)
    grad_out, q, k, v, out = map(with_dense_heads, (grad_out, q, k, v, out))
    delta = _delta(out, grad_out, grad_lse)  # [batch, heads, queries]
    lse = lse.transpose(1, 2)

    key_ranges = list(_ranges(tile.k_positions))
    dq_ranges: list[Tensor | None] = []
    dk_ranges: list[Tensor | None] = [None] * len(key_ranges)
    dv_ranges: list[Tensor | None] = [None] * len(key_ranges)
    for queries in _contiguous_ranges(tile.q_positions):
        range_grad_out = grad_out[:, queries.tokens]
        range_lse = lse[:, :, queries.tokens].contiguous()
        range_delta = delta[:, :, queries.tokens].contiguous()
        dq: Tensor | None = None
        for index, keys in enumerate(key_ranges):
            launch = _Launch(
                tile,
                queries.positions,
                keys.positions,
                q[:, queries.tokens],
                k[:, keys.tokens],
                v[:, keys.tokens],
            )
            dq = _add(dq, launch.query_gradient(range_grad_out, range_lse, range_delta))
            dk, dv = launch.key_gradients(range_grad_out, range_lse, range_delta)
            dk_ranges[index] = _add(dk_ranges[index], dk)
            dv_ranges[index] = _add(dv_ranges[index], dv)
        dq_ranges.append(dq)
    return _concatenate(dq_ranges, q), _concatenate(dk_ranges, k), _concatenate(dv_ranges, v)


def _add(total: Tensor | None, addend: Tensor) -> Tensor:
    return addend if total is None else total.add_(addend)


def _concatenate(ranges: list[Tensor | None], like: Tensor) -> Tensor:
    """Concatenate along time, in fp32; zeros if the tile has no queries, or no keys."""
    tensors = [x for x in ranges if x is not None]
    if not tensors or len(tensors) < len(ranges):
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


@dataclass(frozen=True)
class _Range:
    """A range of a tile's queries or keys: positions in the document, and places in the tile."""

    positions: Blocks
    tokens: slice


def _ranges(positions: tuple[Blocks, ...]) -> Iterator[_Range]:
    first_token = 0
    for blocks in positions:
        yield _Range(blocks, slice(first_token, first_token + len(blocks)))
        first_token += len(blocks)


def _contiguous_ranges(positions: tuple[Blocks, ...]) -> Iterator[_Range]:
    """Cut into ranges of consecutive positions, which the kernels need of queries."""
    yield from _ranges(tuple(part for blocks in positions for part in blocks.contiguous_parts()))


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Return ``sum(out * grad_out) - grad_lse`` of each query: fp32 ``[batch, heads, queries]``."""
    batch, queries, heads, dim = out.shape
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    dlse = delta if grad_lse is None else grad_lse.transpose(1, 2).to(torch.float32).contiguous()
    delta_kernel[triton.cdiv(queries, 64), batch * heads](
        out, grad_out, dlse, delta, *out.stride()[:3], *grad_out.stride()[:3], heads, queries,
        DV=dim, BLOCK_DV=triton.next_power_of_2(dim), BM=64, WITH_LSE=grad_lse is not None,
    )  # fmt: skip
    return delta


def _pattern_rules(pattern: Pattern, kv_heads: int) -> tuple[tuple[Rule, ...], ...]:
    """Return the rules of each head; for block lists the block, as a rule that shows nothing."""
    if isinstance(pattern, BlockLists):
        return ((Rule(pattern.block, stop=0),),) * kv_heads
    assert isinstance(pattern, ClosedFormPattern)
    return tuple(pattern.rules(head) for head in range(kv_heads))


def _pattern_blocks(pattern: Pattern, kv_heads: int) -> list[int]:
    """Return the block sizes of everything in the pattern that comes in whole blocks."""
    if isinstance(pattern, BlockLists):
        return [pattern.block]
    return [
        rule.block for rules in _pattern_rules(pattern, kv_heads) for rule in rules if rule.step > 1
    ]


@dataclass(frozen=True)
class _RuleTable:
    """The rules of each KV head as the kernels read them."""

    rules: np.ndarray
    """int32 ``[kv_heads, num_bands + num_far, columns]``."""
    num_bands: int
    num_fixed: int
    """Far rules whose stripes do not depend on the query."""
    num_far: int
    """Fixed and relative rules."""


@lru_cache(maxsize=256)
def _rule_table(heads: tuple[tuple[Rule, ...], ...], keys: Blocks, key_tile: int) -> _RuleTable:
    """Return the table for tiles of ``key_tile`` keys, whatever the number of keys."""
    bands = [[rule for rule in rules if rule.is_band] for rules in heads]
    fixed = [
        sorted(
            (rule for rule in rules if not rule.is_band and not rule.relative), key=_nearest_first
        )
        for rules in heads
    ]
    relative = [[rule for rule in rules if rule.relative] for rules in heads]

    # All heads have equally many rows of each kind.
    num_bands, num_fixed, num_relative = (
        max(map(len, rules_of_heads)) for rules_of_heads in (bands, fixed, relative)
    )
    table = [
        [
            _table_row(rule, keys, key_tile)
            for rule in (
                *_pad(bands[head], num_bands),
                *_pad(fixed[head], num_fixed),
                *_pad(relative[head], num_relative),
            )
        ]
        for head in range(len(heads))
    ]
    num_far = num_fixed + num_relative
    shape = (len(heads), num_bands + num_far, len(_NO_RULE))
    return _RuleTable(np.array(table, np.int32).reshape(shape), num_bands, num_fixed, num_far)


@lru_cache(maxsize=256)
def _rule_table_on(
    device: torch.device, heads: tuple[tuple[Rule, ...], ...], keys: Blocks, key_tile: int
) -> Tensor:
    return torch.from_numpy(_rule_table(heads, keys, key_tile).rules).to(device)


def _nearest_first(rule: Rule) -> tuple[bool, int]:
    """Sort key: rules without limit come last, as the others bound what is left to them."""
    return rule.stop is None, _UNLIMITED if rule.reach is None else rule.reach * rule.block


def _pad(rules: list[Rule], count: int) -> list[Rule | None]:
    return [*rules, *[None] * (count - len(rules))]


# The columns are shift, reach, stop, step, residue, width, offset, offset step, position and
# position step. This row shows nothing; the kernels may divide by its numbers without harm.
_NO_RULE = (0, 0, 0, 1, 0, 1 << 16, 0, 1 << 16, 0, 1 << 16)
_STOP, _WIDTH, _OFFSET, _OFFSET_STEP, _POSITION, _POSITION_STEP = 2, 5, 6, 7, 8, 9


def _table_row(rule: Rule | None, keys: Blocks, key_tile: int) -> tuple[int, ...]:
    """Return the row of the table for one rule; None for one that shows nothing."""
    if rule is None:
        return _NO_RULE
    shift = rule.block.bit_length() - 1
    most_blocks = _UNLIMITED >> shift
    reach = most_blocks if rule.reach is None else min(rule.reach, most_blocks)
    stop = _UNLIMITED if rule.stop is None else rule.stop
    if rule.is_band:
        stripes: tuple[int, ...] | None = (key_tile, 0, key_tile, 0, key_tile)  # not used
    else:
        stripes = _stripes(rule, keys, key_tile)
    if stripes is None:
        return _NO_RULE
    return (shift, reach, stop, rule.step, rule.residue, *stripes)


def _stripes(rule: Rule, keys: Blocks, key_tile: int) -> tuple[int, int, int, int, int] | None:
    """Return where a far rule has its stripes among the keys, or None if it has none.

    Returns:
        Width, first offset and offset step in the tensor, first position and position step.
    """
    if keys.is_contiguous:
        first_key = keys.first_position
        if rule.step == 1:  # the first tokens of the document, tile by tile
            tile_start = first_key - first_key % key_tile
            return key_tile, tile_start - first_key, key_tile, tile_start, key_tile
        position = 0 if rule.relative else rule.residue * rule.block
        step = rule.step * rule.block
        return rule.block, position - first_key, step, position, step

    if rule.step == 1:
        return keys.size, 0, keys.size, keys.first_position, keys.step * keys.size
    if rule.relative or rule.block != keys.size:
        raise ValueError(
            f"backend triton supports keys in blocks of {keys.size} only with stripes of the same "
            f"blocks, not with {rule}"
        )
    # Block n of the keys is on a stripe if keys.start + n * keys.step = residue (mod rule.step). If
    # there is a solution, every `period`-th block from it on is another.
    period = rule.step // np.gcd(rule.step, keys.step)
    for n in range(period):
        block = keys.start + n * keys.step
        if (block - rule.residue) % rule.step == 0:
            position_step = period * keys.step * keys.size
            return keys.size, n * keys.size, period * keys.size, block * keys.size, position_step
    return None


def _num_far_tiles(table: _RuleTable, keys: Blocks, key_tile: int) -> list[int]:
    """Return how many tiles of ``keys`` each far rule has, at most over the heads."""
    counts = []
    for far in range(table.num_far):
        is_relative = far >= table.num_fixed
        rows = table.rules[:, table.num_bands + far]
        counts.append(max(_num_tiles(row, keys, key_tile, is_relative) for row in rows))
    return counts


def _num_tiles(row: np.ndarray, keys: Blocks, key_tile: int, is_relative: bool) -> int:
    stop = int(row[_STOP])
    width = int(row[_WIDTH])
    if stop == 0:
        return 0
    tiles_per_stripe = width // key_tile
    if is_relative:  # any block of keys, from the one of the first key on
        num_blocks = triton.cdiv(keys.first_position % width + len(keys), width)
        return num_blocks * tiles_per_stripe
    in_tensor = triton.cdiv(max(0, len(keys) - int(row[_OFFSET])), int(row[_OFFSET_STEP]))
    before_stop = triton.cdiv(max(0, stop - int(row[_POSITION])), int(row[_POSITION_STEP]))
    return min(in_tensor, before_stop) * tiles_per_stripe


class _Launch:
    """The launches of the kernels for consecutive queries and one range of keys."""

    def __init__(self, tile: Tile, queries: Blocks, keys: Blocks, q: Tensor, k: Tensor, v: Tensor):
        self.pattern = tile.pattern
        self.logits = tile.logits
        self.q = q
        self.k = k
        self.v = v
        self.q_start = queries.first_position
        self.keys = keys
        self.kv_heads = k.shape[2]
        self.group = q.shape[2] // self.kv_heads
        self.block_lists = tile.pattern if isinstance(tile.pattern, BlockLists) else None
        if self.block_lists is not None:
            at_block_edge = keys.first_position % self.block_lists.block == 0
            if not keys.is_contiguous or not at_block_edge:
                raise ValueError(
                    "backend triton supports BlockLists only with consecutive keys that begin at "
                    "the edge of a block; use torch"
                )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output, and the log-sum-exp ``[batch, queries, heads]``."""
        batch, queries, heads, _ = self.q.shape
        out = self.q.new_empty(batch, queries, heads, self.v.shape[3])
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=self.q.device)
        self._launch_forward_dq("forward", out, lse, None, None)
        return out, lse.transpose(1, 2)

    def query_gradient(self, grad_out: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        """Return dQ in fp32; ``lse`` and ``delta`` are ``[batch, heads, queries]``."""
        dq = torch.empty(self.q.shape, dtype=torch.float32, device=self.q.device)
        self._launch_forward_dq("dq", dq, lse, grad_out, delta)
        return dq

    def key_gradients(self, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return dK and dV in fp32.

        One launch computes what the bands show, and one for each far rule adds what they leave.
        """
        config = self._config("dkv")
        table = self._table(config.keys)
        num_keys = self.k.shape[1]
        first_launch_writes = table.num_bands > 0 or self.block_lists is not None
        new = torch.empty if first_launch_writes else torch.zeros
        dk = new(self.k.shape, dtype=torch.float32, device=self.k.device)
        dv = new(self.v.shape, dtype=torch.float32, device=self.v.device)

        if first_launch_writes:
            num_tiles = triton.cdiv(num_keys, config.keys)
            self._launch_dkv(grad_out, lse, delta, dk, dv, far=-1, num_tiles=num_tiles, splits=1)
        for far, num_tiles in enumerate(_num_far_tiles(table, self.keys, config.keys)):
            if num_tiles:
                self._add_far_rule(grad_out, lse, delta, dk, dv, far, num_tiles)
        return dk, dv

    def _add_far_rule(
        self,
        grad_out: Tensor,
        lse: Tensor,
        delta: Tensor,
        dk: Tensor,
        dv: Tensor,
        far: int,
        num_tiles: int,
    ) -> None:
        """Add what far rule ``far`` shows beyond the bands to ``dk`` and ``dv``."""
        config = self._config("dkv")
        table = self._table(config.keys)
        batch, num_keys, kv_heads, _ = self.k.shape
        num_queries = self.q.shape[1]
        far_keys = num_tiles * config.keys

        # Enough work for each split, and together no more memory than the keys take in fp32.
        busy_splits = num_queries // (config.queries * _MIN_TILES_PER_SPLIT)
        splits = max(1, min(_MAX_SPLITS, busy_splits, num_keys // far_keys))
        # [splits * batch, kv_heads, far keys, dim]
        dk_parts, dv_parts = (
            torch.empty(
                splits * batch, kv_heads, far_keys, x.shape[3], dtype=torch.float32, device=x.device
            )
            for x in (dk, dv)
        )
        self._launch_dkv(
            grad_out,
            lse,
            delta,
            dk_parts.transpose(1, 2),
            dv_parts.transpose(1, 2),
            far=far,
            num_tiles=num_tiles,
            splits=splits,
        )
        for parts, out in ((dk_parts, dk), (dv_parts, dv)):
            strides = (parts.stride(0), parts.stride(2), parts.stride(1), *out.stride()[:3])
            k_start = self._key_range[0]
            reduce_splits_kernel[num_tiles, batch * kv_heads](
                parts, out, self._table_on_device(config.keys), *strides,
                kv_heads, batch, k_start, num_keys, splits,
                D=out.shape[3], BLOCK_D=_block_d(out), BN=config.keys,
                RULES=table.num_bands + table.num_far, RULE=table.num_bands + far,
                RELATIVE=far >= table.num_fixed,
            )  # fmt: skip

    @property
    def _key_range(self) -> tuple[int, int, int, int]:
        """First block, step and size of the keys' blocks, and how many keys there are.

        Consecutive keys are blocks of one position.
        """
        keys = self.keys
        if keys.is_contiguous:
            return keys.first_position, 1, 1, len(keys)
        return keys.start, keys.step, keys.size, len(keys)

    def _config(self, kernel: str) -> KernelConfig:
        """Return the kernel's configuration, with tiles that fit into the pattern's blocks."""
        head_dim = max(_block_d(self.q), _block_d(self.v))
        capability = compute_capability(self.q.device)
        rules = _pattern_rules(self.pattern, self.kv_heads)
        has_relative_rules = any(rule.relative for head_rules in rules for rule in head_rules)
        if kernel == "dkv" and has_relative_rules:
            kernel = "dkv relative"
        config = kernel_config(kernel, capability, self.q.element_size(), head_dim)

        blocks = _pattern_blocks(self.pattern, self.kv_heads)
        if not self.keys.is_contiguous:
            blocks.append(self.keys.size)
        most_keys = min(blocks, default=config.keys)
        depends_on_query_block = self.block_lists is not None or has_relative_rules
        return config.fit(most_keys if depends_on_query_block else config.queries, most_keys)

    def _table(self, key_tile: int) -> _RuleTable:
        table = _rule_table(*self._table_key(key_tile))
        if self.block_lists is not None:
            return replace(table, num_bands=0, num_fixed=0, num_far=0)
        return table

    def _table_on_device(self, key_tile: int) -> Tensor:
        return _rule_table_on(self.q.device, *self._table_key(key_tile))

    def _table_key(self, key_tile: int) -> tuple[tuple[tuple[Rule, ...], ...], Blocks, int]:
        """Return the arguments of the table, the same for any number of consecutive keys."""
        keys = replace(self.keys, count=1) if self.keys.is_contiguous else self.keys
        return _pattern_rules(self.pattern, self.kv_heads), keys, key_tile

    def _constants(self, config: KernelConfig, *gradients: Tensor) -> dict[str, Any]:
        """Return the compile-time arguments that the kernels share."""
        table = self._table(config.keys)
        is_fp32 = self.q.dtype == torch.float32
        use_bulk_copies = (
            has_bulk_copies(compute_capability(self.q.device))
            and not is_fp32
            and fits_bulk_copies(self.q, self.k, self.v, *gradients)
        )
        return {
            "D": self.q.shape[3],
            "DV": self.v.shape[3],
            "BLOCK_D": _block_d(self.q),
            "BLOCK_DV": _block_d(self.v),
            "BM": config.queries,
            "BN": config.keys,
            "BANDS": table.num_bands,
            "FIXED": table.num_fixed,
            "FARS": table.num_far,
            "LISTED": self.block_lists is not None,
            "SOFTCAP": self.logits.softcap is not None,
            "SIGMOID": not self.logits.is_softmax,
            "TMA": use_bulk_copies,
            "PRECISION": "ieee" if is_fp32 else "tf32",
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    @property
    def _scales(self) -> tuple[float, float, float]:
        return self.logits.scale, self.logits.softcap or 0.0, self.logits.sigmoid_bias or 0.0

    def _launch_forward_dq(
        self, kernel: str, out: Tensor, lse: Tensor, grad_out: Tensor | None, delta: Tensor | None
    ) -> None:
        """Launch the kernel as ``forward``, or as ``dq`` with ``grad_out`` and ``delta``."""
        config = self._config(kernel)
        batch, num_queries, heads, _ = self.q.shape
        lists = lse  # any pointer
        list_strides = (0, 0, 0)
        if self.block_lists is not None:
            lists = _lists_by_query(self.block_lists.of_heads(self.kv_heads).to(self.q.device))
            batch_stride = lists.stride(0) if lists.shape[0] > 1 else 0
            list_strides = (batch_stride, lists.stride(1), lists.stride(2))
        do = out if grad_out is None else grad_out
        num_tiles = triton.cdiv(self.q_start % config.queries + num_queries, config.queries)
        forward_dq_kernel[num_tiles, batch * heads](
            self.q, self.k, self.v, out, lse, do, lse if delta is None else delta,
            self._table_on_device(config.keys), lists, *self._scales,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
            *out.stride()[:3], *do.stride()[:3], *list_strides,
            heads, self.group, self.q_start, num_queries, *self._key_range,
            GRAD=kernel == "dq", **self._constants(config, do),
        )  # fmt: skip

    def _launch_dkv(
        self,
        grad_out: Tensor,
        lse: Tensor,
        delta: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        far: int,
        num_tiles: int,
        splits: int,
    ) -> None:
        """Launch the kernel for the bands or lists (``far`` is -1), or for one far rule."""
        config = self._config("dkv")
        batch, num_queries, _, _ = self.q.shape
        pointers = lists = lse  # any pointer
        list_strides = (0, 0)
        if self.block_lists is not None:
            by_query = self.block_lists.of_heads(self.kv_heads).to(self.q.device)
            num_blocks = (self.keys.end_position - 1) // self.block_lists.block + 1
            pointers, lists = _lists_by_key(by_query, num_blocks)
            batch_stride = self.kv_heads * num_blocks if by_query.shape[0] > 1 else 0
            list_strides = (batch_stride, num_blocks)
        dkv_kernel[num_tiles * splits, batch * self.kv_heads](
            self.q, self.k, self.v, lse, grad_out, delta, dk, dv,
            self._table_on_device(config.keys), pointers, lists, *self._scales,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
            *grad_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *list_strides,
            self.kv_heads, self.group, self.q_start, num_queries, *self._key_range, splits,
            FAR=far, **self._constants(config, grad_out),
        )  # fmt: skip


def _block_d(x: Tensor) -> int:
    """Return the head dim of a kernel's tiles, a power of two."""
    return max(16, triton.next_power_of_2(x.shape[3]))


def _lists_by_query(lists: Tensor) -> Tensor:
    """Put before each query block's list how many blocks it sees.

    The lists ascend, so that the blocks ahead of the queries, which it does not see, come last.

    Returns:
        int32 ``[batch or 1, kv_heads, query_blocks, 1 + width]``.
    """
    query_block = torch.arange(lists.shape[2], device=lists.device)[:, None]
    count = ((lists >= 0) & (lists <= query_block)).sum(-1, keepdim=True)
    return torch.cat([count, lists], -1).to(torch.int32).contiguous()


def _lists_by_key(lists: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """Turn lists of key blocks per query block into lists of query blocks per key block.

    Computed on the device of the lists, without waiting for it.

    Returns:
        Where the list of each key block begins, in one row for all batch rows and heads, with the
        end of the last; and the lists, ascending, one after another. Both int32.
    """
    batch, heads, query_blocks, width = lists.shape
    device = lists.device
    query_block = torch.arange(query_blocks, device=device)[:, None]
    head_index = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    none = batch * heads * key_blocks

    visible = (lists >= 0) & (lists <= query_block) & (lists < key_blocks)
    keys = torch.where(visible, head_index * key_blocks + lists, none).flatten()
    keys, order = keys.sort(stable=True)
    begins = torch.searchsorted(keys, torch.arange(none + 1, device=device))
    queries = query_block.expand(batch, heads, -1, width).flatten()[order]
    return begins.to(torch.int32), queries.to(torch.int32)
