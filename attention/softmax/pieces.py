"""Cuts a tile into pieces: some queries, the keys that they need, and a mask if it is needed.

Work and memory follow the visible pairs. A block of queries that starts at position ``a`` finds its
keys in these parts::

    before the bands              | the bands' lower edges | what all bands show ... a ... diagonal
    no mask if all queries see it |                        |
    masked if some see it         | masked if some see it  |
                                  | the bands, a few queries at a time: one mask for all heads

Far keys are taken in blocks that the pattern cannot tell apart. Which of them a block of queries
needs is found for all of them at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise
from math import gcd
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..patterns import Blocks, ClosedFormPattern, Rule
from ..patterns.block_lists import BlockLists
from ..patterns.rules import union_masks

_QUERY_BLOCK = 1024
"""Queries that share a call for far keys: many for a large product, few for a small mask."""
_MIN_BAND_QUERIES = 64
"""Queries that share a call for a band: with fewer, the calls cost more than what they compute."""
_NARROW_BAND = 2048
"""A band of up to this many tokens is one masked call; the middle of a wider one needs no mask."""

_FIRST_TOKENS_BLOCK = 64
"""Keys in a block where the first tokens are more than the keys of a tile."""


@dataclass(frozen=True)
class Mask:
    """Which pairs of a piece are visible."""

    bias: Tensor
    """0 or minus infinity, for the logits: ``[batch or 1, kv_heads or 1, queries, keys]``."""
    sees_nothing: Tensor | None
    """Queries without a key: bool ``[batch or 1, kv_heads or 1, queries]``; None if all see one."""


@dataclass(frozen=True)
class Piece:
    """Some queries of a tile, and keys for them."""

    kv_heads: slice
    queries: slice
    """Tokens of the tile's queries."""
    keys: slice | Tensor
    """Tokens of the range of keys, or its blocks: int64 ``[batch or 1, kv_heads, key_blocks]``."""
    mask: Mask | Literal["causal"] | None = None
    """None if all pairs are visible; "causal" if queries and keys are at the same positions."""


@dataclass(frozen=True)
class HeadGroup:
    """KV heads that differ in nothing but the residues of their stripes."""

    kv_heads: slice
    rules: tuple[tuple[Rule, ...], ...]
    """The rules of each head."""

    @property
    def bands(self) -> list[Rule]:
        """The bands, which are the same in all heads."""
        return [rule for rule in self.rules[0] if rule.is_band]

    @property
    def far_rules(self) -> list[tuple[Rule, ...]]:
        """The rules of each head that are no bands."""
        return [tuple(rule for rule in rules if not rule.is_band) for rules in self.rules]

    def band_start(self, query: int) -> int:
        """Return the first key in the band of ``query``; ``query + 1`` if there is no band."""
        return min((rule.first_key(query) for rule in self.bands), default=query + 1)


def group_heads(pattern: ClosedFormPattern, kv_heads: int) -> list[HeadGroup]:
    """Return all heads, neighbors together if their rules differ only in residues."""
    rules = [pattern.rules(head) for head in range(kv_heads)]
    without_residues = [
        tuple(rule if rule.relative else replace(rule, residue=0) for rule in head_rules)
        for head_rules in rules
    ]
    groups = []
    for _, members in groupby(range(kv_heads), key=without_residues.__getitem__):
        heads = list(members)
        head_rules = tuple(rules[head] for head in heads)
        groups.append(HeadGroup(slice(heads[0], heads[-1] + 1), head_rules))
    return groups


def key_block_size(groups: list[HeadGroup], keys: Blocks) -> int:
    """Return how many neighboring keys the far rules never tell apart, at least."""
    far_rules = [rule for group in groups for rules in group.far_rules for rule in rules]
    sizes = [rule.block for rule in far_rules if rule.step > 1]
    if not keys.is_contiguous:
        sizes.append(keys.size)
    if not sizes:
        # Only first tokens. Otherwise their edge may fall inside a block, which then gets a mask.
        sizes = [rule.stop for rule in far_rules if rule.stop]
        if gcd(*sizes) > len(keys):  # keys are padded to whole blocks
            return _FIRST_TOKENS_BLOCK
    return gcd(*sizes) or 1


@dataclass(frozen=True)
class QueryRange:
    """Queries at consecutive positions."""

    start: int
    stop: int
    offset: int
    """Position minus place in the tile."""

    @property
    def tokens(self) -> slice:
        """The places of the queries in the tile."""
        return slice(self.start - self.offset, self.stop - self.offset)

    def part(self, start: int, stop: int) -> "QueryRange":
        """Return the queries at positions ``start`` to ``stop``."""
        return QueryRange(start, stop, self.offset)

    def parts(self, size: int) -> Iterator["QueryRange"]:
        """Cut the range at the multiples of ``size``."""
        first_edge = self.start - self.start % size + size
        for start in [self.start, *range(first_edge, self.stop, size)]:
            stop = min(self.stop, start - start % size + size)
            yield self.part(start, stop)


def query_ranges(positions: tuple[Blocks, ...]) -> Iterator[QueryRange]:
    """Cut the queries of a tile into ranges of consecutive positions."""
    tokens_before = 0
    for blocks in positions:
        for part in blocks.contiguous_parts():
            start = part.first_position
            yield QueryRange(start, start + len(part), start - tokens_before)
            tokens_before += len(part)


class _KeyBlocks:
    """A range of keys, cut into blocks of ``size`` at multiples of ``size``."""

    def __init__(self, keys: Blocks, size: int):
        self.size = size
        self.is_contiguous = keys.is_contiguous
        self.first = keys.first_position
        self.end = keys.end_position
        self.starts: np.ndarray
        """Position of each block's first key, which may be before the first key of the range."""
        if self.is_contiguous:
            self.starts = np.arange(self.first - self.first % size, self.end, size)
        else:
            self.starts = keys.positions()[::size]


def closed_form_pieces(
    group: HeadGroup, queries: QueryRange, keys: Blocks, key_block: int, like: Tensor
) -> Iterator[Piece]:
    """Cut the attention of ``queries`` to one range of keys into pieces.

    Args:
        key_block: keys in a block; the first block begins at the multiple of ``key_block`` at or
            before the first key.
        like: masks have its dtype and device.
    """
    key_blocks = _KeyBlocks(keys, key_block)
    has_band = key_blocks.is_contiguous and bool(group.bands)
    if has_band and group.band_start(queries.stop - 1) <= key_blocks.first:
        yield from _causal_pieces(group, queries, key_blocks)
        return

    # A relative rule shows other keys to each of its blocks of queries.
    relative_blocks = [rule.block for rules in group.rules for rule in rules if rule.relative]
    query_block = min([_QUERY_BLOCK, *relative_blocks])
    for part in queries.parts(query_block):
        yield from _far_pieces(group, part, key_blocks, like)
        if has_band:
            yield from _band_pieces(group, part, key_blocks, like)


def _causal_pieces(group: HeadGroup, queries: QueryRange, keys: _KeyBlocks) -> Iterator[Piece]:
    """Pieces of queries whose bands all reach back to the first key."""
    num_keys_before = min(queries.start, keys.end) - keys.first
    if num_keys_before > 0:
        yield Piece(group.kv_heads, queries.tokens, slice(0, num_keys_before))

    # The positions that have both a query and a key.
    start = max(queries.start, keys.first)
    stop = min(queries.stop, keys.end)
    if start < stop:
        diagonal_keys = slice(start - keys.first, stop - keys.first)
        yield Piece(group.kv_heads, queries.part(start, stop).tokens, diagonal_keys, "causal")
        if stop < queries.stop:
            later_queries = queries.part(stop, queries.stop)
            yield Piece(group.kv_heads, later_queries.tokens, diagonal_keys)


def _band_pieces(
    group: HeadGroup, queries: QueryRange, keys: _KeyBlocks, like: Tensor
) -> Iterator[Piece]:
    """Pieces of the band: one per part if it is narrow, else with its middle unmasked."""
    width = queries.stop - group.band_start(queries.stop - 1)
    # What is computed in vain at a band's two edges grows with the queries of a call. A quarter of
    # the width keeps it small beside the band itself.
    num_queries = max(_MIN_BAND_QUERIES, _power_of_two_up_to(min(width // 4, _QUERY_BLOCK)))
    bands = tuple(group.bands)
    largest_block = max(rule.block for rule in bands)

    for part in queries.parts(num_queries):
        lowest = group.band_start(part.start)  # from here on some query sees the keys
        all_see = group.band_start(part.stop - 1)  # and from here on all of them
        if width <= _NARROW_BAND:
            edges = [lowest, part.stop]
        else:
            edges = [lowest, min(all_see, part.start), part.start, part.stop]

        for start, stop in pairwise(edges):
            start = max(start, keys.first)
            stop = min(stop, keys.end)
            if start >= stop:
                continue
            mask = None
            if start < all_see or stop > part.start:
                # Positions that count from a block's edge make equal masks equal keys of the cache.
                base = part.start - part.start % largest_block
                positions = np.arange(start - base, stop - base)[None]
                mask = _mask_of_rules(
                    (bands,), ((),), part.start - base, part.stop - base, positions, like
                )
            yield Piece(
                group.kv_heads, part.tokens, slice(start - keys.first, stop - keys.first), mask
            )


def _power_of_two_up_to(n: int) -> int:
    """Return the largest power of two that is not larger than ``n``; 0 for 0."""
    return 1 << n.bit_length() >> 1


def _far_pieces(
    group: HeadGroup, queries: QueryRange, keys: _KeyBlocks, like: Tensor
) -> Iterator[Piece]:
    """Pieces of what the band leaves: key blocks that all queries see, and those that some see."""
    full, partial = _far_key_blocks(group, queries, keys)

    # A piece has equally many blocks in all heads: what a head has beyond that gets a mask.
    num_full = min(map(len, full), default=0)
    if num_full:
        index = np.stack([blocks[:num_full] for blocks in full])[None]  # [1, kv_heads, key_blocks]
        yield Piece(group.kv_heads, queries.tokens, torch.from_numpy(index).to(like.device))

    masked = [
        np.union1d(blocks[num_full:], more) for blocks, more in zip(full, partial, strict=True)
    ]
    if any(map(len, masked)):
        yield _masked_far_piece(group, queries, keys, masked, like)


def _far_key_blocks(
    group: HeadGroup, queries: QueryRange, keys: _KeyBlocks
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return for each head the key blocks that all queries see, and those that only some may see.

    Only of blocks that the band does not show to all queries. Both are ascending indices.
    """
    far_rules = _far_rules(group, keys)
    if not any(far_rules):
        return [], []
    # From `lowest` on the band shows something to some query, from `all_see` on everything to all.
    if keys.is_contiguous:
        lowest = group.band_start(queries.start)
        all_see = group.band_start(queries.stop - 1)
    else:
        lowest = queries.start + 1
        all_see = queries.stop

    starts = keys.starts[: np.searchsorted(keys.starts, all_see)]
    is_inside = (starts >= keys.first) & (starts + keys.size <= min(lowest, keys.end))
    full = []
    partial = []
    for rules in far_rules:
        seen_by_all = union_masks(_seen_by_all(rule, queries, starts, keys.size) for rule in rules)
        seen_by_some = union_masks(
            _seen_by_some(rule, queries, starts, keys.size) for rule in rules
        )
        is_full = seen_by_all & is_inside
        full.append(np.flatnonzero(is_full))
        partial.append(np.flatnonzero(seen_by_some & ~is_full))
    return full, partial


def _far_rules(group: HeadGroup, keys: _KeyBlocks) -> list[tuple[Rule, ...]]:
    """Return the rules of each head that the pieces of far keys are for.

    Among keys that are not contiguous a band cannot be cut off as a slice, so these are all rules.
    """
    return group.far_rules if keys.is_contiguous else list(group.rules)


def _masked_far_piece(
    group: HeadGroup,
    queries: QueryRange,
    keys: _KeyBlocks,
    key_blocks: list[np.ndarray],
    like: Tensor,
) -> Piece:
    """Return the piece of some key blocks per head, with a mask of what the band does not show."""
    far_rules = _far_rules(group, keys)
    bands = tuple(group.bands) if keys.is_contiguous else ()

    # Pad to equally many blocks in all heads.
    count = max(map(len, key_blocks))
    index = np.stack(
        [np.pad(blocks, (0, count - len(blocks)), constant_values=-1) for blocks in key_blocks]
    )  # [kv_heads, key_blocks]

    # Positions of the keys; those that are padding, or outside the range, come after all queries.
    hidden = queries.stop
    starts = np.where(index < 0, hidden, keys.starts[index])
    positions = starts[..., None] + np.arange(keys.size)
    is_outside = (positions < keys.first) | (positions >= keys.end)
    positions = np.where(is_outside, hidden, positions).reshape(len(index), -1)

    # Positions that count from a block's edge make equal masks equal keys of the cache.
    base = queries.start - queries.start % max(
        rule.block for rules in group.rules for rule in rules
    )
    positions = positions - base
    shown = tuple(tuple(_rule_from(rule, base, positions) for rule in rules) for rules in far_rules)
    mask = _mask_of_rules(
        shown,
        (bands,) * len(far_rules),
        queries.start - base,
        queries.stop - base,
        positions,
        like,
    )
    present_index = torch.from_numpy(index.clip(0)[None]).to(like.device)
    return Piece(group.kv_heads, queries.tokens, present_index, mask)


def block_list_pieces(
    pattern: BlockLists, kv_heads: int, queries: QueryRange, keys: Blocks, like: Tensor
) -> Iterator[Piece]:
    """Cut the attention of ``queries`` to one range of keys into a piece per block of queries."""
    size = pattern.block
    device = like.device
    key_blocks = _KeyBlocks(keys, size)
    lists = pattern.of_heads(kv_heads).to(device)  # [batch or 1, kv_heads, query_blocks, width]

    # Which block of the range each block of the document is; -1 for none, as in the last entry.
    index_in_range = torch.full((key_blocks.end // size + 2,), -1, device=device)
    blocks_in_document = torch.from_numpy(key_blocks.starts // size).to(device)
    index_in_range[blocks_in_document] = torch.arange(len(key_blocks.starts), device=device)

    for part in queries.parts(size):
        listed = lists[:, :, part.start // size]  # [batch or 1, kv_heads, width]
        listed = listed.clamp(max=len(index_in_range) - 1).long()  # -1 means the last entry too
        index = index_in_range[listed]

        # Positions of the keys; those of absent blocks or outside the range are after all queries.
        starts = torch.where(index < 0, part.stop, listed * size)
        positions = starts[..., None] + torch.arange(size, device=device)
        is_outside = (positions < key_blocks.first) | (positions >= key_blocks.end)
        positions = torch.where(is_outside, part.stop, positions).flatten(-2)

        query_positions = torch.arange(part.start, part.stop, device=device)
        # [batch or 1, kv_heads, queries, keys]
        visible = query_positions[:, None] >= positions[:, :, None]
        mask = Mask(visibility_bias(visible, like.dtype), ~visible.any(-1))
        yield Piece(slice(0, kv_heads), part.tokens, index.clamp(min=0), mask)


def _seen_by_all(rule: Rule, queries: QueryRange, starts: np.ndarray, size: int) -> np.ndarray:
    """Return for each key block whether all of the queries certainly see all of it."""
    first_query_block = queries.start // rule.block
    last_query_block = (queries.stop - 1) // rule.block
    key_blocks = starts // rule.block

    causal_end = queries.start + 1
    seen = starts + size <= min(causal_end, rule.stop or causal_end)
    if rule.reach is not None:
        seen &= last_query_block - key_blocks < rule.reach
    if rule.step > 1 and rule.relative:
        same_phase = (first_query_block - key_blocks) % rule.step == rule.residue
        return seen & (first_query_block == last_query_block) & same_phase
    return seen & (key_blocks % rule.step == rule.residue)


def _seen_by_some(rule: Rule, queries: QueryRange, starts: np.ndarray, size: int) -> np.ndarray:
    """Return for each key block whether some query may see some key of it."""
    first_query_block = queries.start // rule.block
    last_query_block = (queries.stop - 1) // rule.block
    key_blocks = starts // rule.block

    seen = starts < min(queries.stop, rule.stop or queries.stop)
    if rule.reach is not None:
        last_key_blocks = (starts + size - 1) // rule.block
        seen &= first_query_block - last_key_blocks < rule.reach
    if rule.step > 1 and rule.relative:
        query_blocks = np.arange(first_query_block, last_query_block + 1)
        distance = query_blocks[:, None] - key_blocks  # [query_blocks, key_blocks]
        return seen & ((distance >= 0) & (distance % rule.step == rule.residue)).any(0)
    return seen & (key_blocks % rule.step == rule.residue)


def _rule_from(rule: Rule, base: int, keys: np.ndarray) -> Rule:
    """Return the rule for positions that count from ``base``, a multiple of the rule's block.

    It is the same for all bases where that is possible, so that the cache of masks finds it: a
    ``stop`` beyond the ``keys`` becomes one right beyond them.
    """
    residue = rule.residue
    if not rule.relative:
        residue = (rule.residue - base // rule.block) % rule.step
    stop = rule.stop
    if stop is not None:
        stop = int(np.clip(stop - base, keys.min(), keys.max() + 1))
    return replace(rule, residue=residue, stop=stop)


RulesPerHead = tuple[tuple[Rule, ...], ...]


def _mask_of_rules(
    shown: RulesPerHead,
    hidden: RulesPerHead,
    query_start: int,
    query_stop: int,
    key_positions: np.ndarray,
    like: Tensor,
) -> Mask:
    """Return the mask of what each head's ``shown`` rules show and its ``hidden`` rules do not.

    Args:
        key_positions: int64 ``[kv_heads, keys]``.
    """
    keys = key_positions.tobytes()  # can be hashed
    return _cached_mask(shown, hidden, query_start, query_stop, keys, like.dtype, like.device)


@lru_cache(maxsize=32)
def _cached_mask(
    shown: RulesPerHead,
    hidden: RulesPerHead,
    query_start: int,
    query_stop: int,
    key_positions: bytes,
    dtype: torch.dtype,
    device: torch.device,
) -> Mask:
    queries = np.arange(query_start, query_stop)[:, None]
    keys = np.frombuffer(key_positions, np.int64).reshape(len(shown), -1)
    masks = []
    for shown_rules, hidden_rules, head_keys in zip(shown, hidden, keys, strict=True):
        visible = union_masks(rule.mask(queries, head_keys) for rule in shown_rules)
        if hidden_rules:
            visible &= ~union_masks(rule.mask(queries, head_keys) for rule in hidden_rules)
        masks.append(visible)

    visible = torch.from_numpy(np.stack(masks))[None]  # [1, kv_heads, queries, keys]
    sees_nothing = ~visible.any(-1)
    return Mask(
        visibility_bias(visible, dtype).to(device),
        sees_nothing.to(device) if bool(sees_nothing.any()) else None,
    )


def visibility_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 for visible pairs and minus infinity for all others."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, -torch.inf)
