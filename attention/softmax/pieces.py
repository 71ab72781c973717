"""A tile of a closed-form pattern as a few pieces: for each stretch of queries, the keys that all of its rows see, and those
that some see, with a mask. Work and memory follow the pairs that are seen.

The keys of a stretch that starts at position ``a`` fall into these::

    before the band of all rows | the band's lower edge        | the band of all rows ... a ... diagonal
    whole: all rows see it      | some: what is not the band's, masked
                                | the band, a few rows at a time: one mask for all heads and stretches

Granules are runs of keys that the pattern cannot tell apart; which of them a stretch needs is found for all at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise
from math import gcd

import numpy as np
import torch
from torch import Tensor

from ..patterns import ClosedFormPattern
from ..patterns.block_lists import BlockLists
from ..patterns.rules import Blocks, Rule, union_masks

# Queries that share a call for far keys; a band takes fewer, as its corners are computed in vain.
_STRETCH = 1024
_LEAST = 64
# A band up to so many tokens wide is one call, masked throughout.
_NARROW = 2048


@dataclass(frozen=True)
class Mask:
    """Which pairs of a piece are seen."""

    added: Tensor
    """To the logits: 0 or minus infinity, ``[batch or 1, heads or 1, queries, keys]``."""
    blind: Tensor | None
    """Rows that see no key, bool ``[batch or 1, heads or 1, queries]``; None where there are none."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a tile, and keys for them."""

    heads: slice
    """KV heads."""
    queries: slice
    """Rows of the tile."""
    keys: slice | Tensor
    """Rows of the run of keys, or granules of it: int64 ``[batch or 1, heads, granules]``."""
    mask: Mask | str | None = None
    """None where all is seen; "causal" where there are as many keys as queries, at the same positions."""


@dataclass(frozen=True)
class Heads:
    """KV heads that differ in nothing but the residues of their stripes."""

    heads: slice
    rules: tuple[tuple[Rule, ...], ...]
    """Of each head."""

    @property
    def bands(self) -> list[Rule]:
        return [rule for rule in self.rules[0] if rule.is_band]

    @property
    def far(self) -> list[tuple[Rule, ...]]:
        """The rules of each head that are no bands."""
        return [tuple(rule for rule in rules if not rule.is_band) for rules in self.rules]

    def first_key(self, query: int) -> int:
        """Where the band of ``query`` begins; behind ``query`` where there is none."""
        return min((rule.first_key(query) for rule in self.bands), default=query + 1)


def groups(pattern: ClosedFormPattern, kv_heads: int) -> list[Heads]:
    """All heads, those beside one another together where their rules differ only in residues."""
    rules = [pattern.rules(head) for head in range(kv_heads)]
    shape = [
        tuple(rule if rule.relative else replace(rule, residue=0) for rule in own) for own in rules
    ]
    found = []
    for _, heads in groupby(range(kv_heads), key=shape.__getitem__):
        heads = list(heads)
        found.append(Heads(slice(heads[0], heads[-1] + 1), tuple(rules[head] for head in heads)))
    return found


def granule(groups: list[Heads], run: Blocks) -> int:
    """How many keys of ``run`` the far rules never tell apart, at least."""
    far = [rule for group in groups for rules in group.far for rule in rules]
    blocks = [rule.block for rule in far if rule.step > 1] + ([run.size] if run.step > 1 else [])
    # The edge of the first tokens may fall inside a block: that one then takes a mask.
    return gcd(*(blocks or [rule.stop for rule in far if rule.stop])) or 1


def pieces(
    group: Heads, queries: Blocks, row: int, keys: Blocks, size: int, like: Tensor
) -> Iterator[Piece]:
    """The pieces of ``queries``, consecutive positions whose first is row ``row`` of the tile, against the run ``keys``.

    Granules have ``size`` keys; the first starts at the multiple of ``size`` at or before the first key. Masks are made in
    the dtype and on the device of ``like``.
    """
    begin = queries.start * queries.size
    run = _Run(keys, size)
    if run.contiguous and group.bands and group.first_key(begin + len(queries) - 1) <= run.first:
        yield from _causal(group, begin, begin + len(queries), row, run)
        return
    # A relative rule shows other blocks to each block of queries.
    relative = [rule.block for rules in group.rules for rule in rules if rule.relative]
    stretch = min([_STRETCH, *relative])
    for a in [begin, *range(begin - begin % stretch + stretch, begin + len(queries), stretch)]:
        b = min(begin + len(queries), a - a % stretch + stretch)
        yield from _far(group, a, b, row + a - begin, run, like)
        if run.contiguous and group.bands:
            yield from _band(group, a, b, row + a - begin, run, like)


class _Run:
    """A run of keys, in granules."""

    def __init__(self, keys: Blocks, size: int):
        self.size, self.contiguous = size, keys.step == 1
        self.first = keys.start * keys.size
        """Position of the first key."""
        self.last = (keys.start + (keys.count - 1) * keys.step + 1) * keys.size
        """Position behind the last key."""
        if self.contiguous:
            self.at = np.arange(self.first - self.first % size, self.last, size)
        else:
            self.at = keys.positions()[::size]


def _causal(group: Heads, begin: int, end: int, row: int, run: _Run) -> Iterator[Piece]:
    """Where the band of every query reaches back to the first key."""
    start, stop = max(begin, run.first), min(end, run.last)
    rows = lambda a, b: slice(row + a - begin, row + b - begin)  # noqa: E731
    before = slice(0, min(begin, run.last) - run.first)
    if before.stop > 0:
        yield Piece(group.heads, rows(begin, end), before)
    if start < stop:
        beside = slice(start - run.first, stop - run.first)
        yield Piece(group.heads, rows(start, stop), beside, "causal")
        if stop < end:
            yield Piece(group.heads, rows(stop, end), beside)


def _band(group: Heads, a: int, b: int, row: int, run: _Run, like: Tensor) -> Iterator[Piece]:
    """The band of a stretch, some rows at a time: all in one call where it is narrow, else without a mask in the middle."""
    width = b - group.first_key(b - 1)
    step = max(_LEAST, 1 << min(width // 4, _STRETCH).bit_length() >> 1)
    bands = (tuple(group.bands),)
    for start in [a, *range(a - a % step + step, b, step)]:
        stop = min(b, start - start % step + step)
        lowest, whole = group.first_key(start), group.first_key(stop - 1)
        cuts = [lowest, stop] if width <= _NARROW else [lowest, min(whole, start), start, stop]
        for lo, hi in pairwise(cuts):
            lo, hi = max(lo, run.first), min(hi, run.last)
            if lo >= hi:
                continue
            mask = None
            if lo < whole or hi > start:
                base = start - start % max(rule.block for rule in group.bands)
                at = np.arange(lo - base, hi - base)[None]
                mask = _mask(
                    bands, ((),), start - base, stop - base, at.tobytes(), like.dtype, like.device
                )
            yield Piece(
                group.heads,
                slice(row + start - a, row + stop - a),
                slice(lo - run.first, hi - run.first),
                mask,
            )


def _far(group: Heads, a: int, b: int, row: int, run: _Run, like: Tensor) -> Iterator[Piece]:
    """What the band leaves of a stretch: granules that all of its rows see, and those that some see, with a mask."""
    bands = group.bands if run.contiguous else []
    far = group.far if run.contiguous else group.rules
    if not any(far):
        return
    # Behind `lowest` the band shows something to some row, behind `highest` all to all.
    lowest, highest = (group.first_key(q) if run.contiguous else q + 1 for q in (a, b - 1))
    at = run.at[: np.searchsorted(run.at, highest)]
    inside = (at >= run.first) & (at + run.size <= min(lowest, run.last))
    whole, some = [], []
    for rules in far:
        by_all = union_masks(_seen_by_all(rule, a, b, at, run.size) for rule in rules) & inside
        by_some = union_masks(_seen_by_some(rule, a, b, at, run.size) for rule in rules)
        whole.append(np.flatnonzero(by_all))
        some.append(np.flatnonzero(by_some & ~by_all))
    rows = slice(row, row + b - a)
    count = min(
        map(len, whole)
    )  # equally many for all heads: those that one has more go with a mask
    if count:
        yield Piece(
            group.heads,
            rows,
            torch.from_numpy(np.stack([x[:count] for x in whole])[None]).to(like.device),
        )
    some = [np.union1d(own[count:], more) for own, more in zip(whole, some, strict=True)]
    count = max(map(len, some))
    if count:
        shown = np.stack([np.pad(x, (0, count - len(x)), constant_values=-1) for x in some])
        base = a - a % max(rule.block for rules in group.rules for rule in rules)
        keys = np.where(shown < 0, b, run.at[shown])[..., None] + np.arange(run.size)
        keys = (
            np.where((keys < run.first) | (keys >= run.last), b, keys).reshape(len(shown), -1)
            - base
        )
        rules = tuple(tuple(_from(rule, base, keys) for rule in own) for own in far)
        mask = _mask(
            rules,
            (tuple(bands),) * len(far),
            a - base,
            b - base,
            keys.tobytes(),
            like.dtype,
            like.device,
        )
        yield Piece(group.heads, rows, torch.from_numpy(shown.clip(0)[None]).to(like.device), mask)


def list_pieces(
    pattern: BlockLists, kv_heads: int, queries: Blocks, row: int, keys: Blocks, like: Tensor
) -> Iterator[Piece]:
    """The pieces of ``queries`` against the run ``keys`` for lists of blocks: one for each block of queries."""
    begin, size, device = queries.start * queries.size, pattern.block, like.device
    run, lists = _Run(keys, size), pattern.of_heads(kv_heads).to(device)
    granules = torch.full((run.last // size + 2,), -1, device=device)
    granules[torch.from_numpy(run.at // size).to(device)] = torch.arange(len(run.at), device=device)
    for a in [begin, *range(begin - begin % size + size, begin + len(queries), size)]:
        b = min(begin + len(queries), a - a % size + size)
        shown = (
            lists[:, :, a // size].clamp(max=len(granules) - 1).long()
        )  # the last, like -1, is no granule
        at = torch.where(granules[shown] < 0, b, shown * size)[..., None] + torch.arange(
            size, device=device
        )
        at = torch.where((at < run.first) | (at >= run.last), b, at).flatten(-2)
        seen = torch.arange(a, b, device=device)[:, None] >= at[:, :, None]
        rows = slice(row + a - begin, row + b - begin)
        yield Piece(
            slice(0, kv_heads), rows, granules[shown].clamp(min=0), _added(seen, like.dtype)
        )


def _seen_by_all(rule: Rule, a: int, b: int, at: np.ndarray, size: int) -> np.ndarray:
    """Whether every query in ``[a, b)`` surely sees every key of the granule."""
    first, last = a // rule.block, (b - 1) // rule.block
    seen = at + size <= min(a + 1, rule.stop or a + 1)
    if rule.reach is not None:
        seen &= last - at // rule.block < rule.reach
    if rule.step > 1 and rule.relative:
        return seen & (first == last) & ((first - at // rule.block) % rule.step == rule.residue)
    return seen & (at // rule.block % rule.step == rule.residue)


def _seen_by_some(rule: Rule, a: int, b: int, at: np.ndarray, size: int) -> np.ndarray:
    """Whether some query in ``[a, b)`` may see some key of the granule."""
    seen = at < min(b, rule.stop or b)
    if rule.reach is not None:
        seen &= a // rule.block - (at + size - 1) // rule.block < rule.reach
    if rule.step > 1 and rule.relative:
        away = np.arange(a // rule.block, (b - 1) // rule.block + 1)[:, None] - at // rule.block
        return seen & ((away >= 0) & (away % rule.step == rule.residue)).any(0)
    return seen & (at // rule.block % rule.step == rule.residue)


def _from(rule: Rule, base: int, keys: np.ndarray) -> Rule:
    """The rule for positions that count from ``base``, a multiple of its block; the same for all bases where it can be."""
    residue = rule.residue if rule.relative else (rule.residue - base // rule.block) % rule.step
    stop = None if rule.stop is None else int(np.clip(rule.stop - base, keys.min(), keys.max() + 1))
    return replace(rule, residue=residue, stop=stop)


@lru_cache(maxsize=32)
def _mask(
    shown: tuple,
    hidden: tuple,
    start: int,
    stop: int,
    keys: bytes,
    dtype: torch.dtype,
    device: torch.device,
) -> Mask:
    """For queries from ``start`` to ``stop`` and each head's ``keys``: what its rules ``shown`` show and ``hidden`` do not."""
    queries, keys = (
        np.arange(start, stop)[:, None],
        np.frombuffer(keys, np.int64).reshape(len(shown), -1),
    )
    seen = []
    for own, others, at in zip(shown, hidden, keys, strict=True):
        seen.append(union_masks(rule.mask(queries, at) for rule in own))
        if others:
            seen[-1] &= ~union_masks(rule.mask(queries, at) for rule in others)
    seen = torch.from_numpy(np.stack(seen))[None]
    mask = _added(seen, dtype)
    return Mask(mask.added.to(device), mask.blind.to(device) if bool(mask.blind.any()) else None)


def _added(seen: Tensor, dtype: torch.dtype) -> Mask:
    return Mask(
        torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf),
        ~seen.any(-1),
    )
