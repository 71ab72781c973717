"""The closed form of patterns: rules, and arithmetic on the ranges of key blocks that they show.

Rules work on torch tensors and numpy arrays alike. Nothing here imports torch, so that checking a
recipe stays fast.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import numpy as np

Mask = TypeVar("Mask", bound=Any)
"""A bool tensor or array."""


@dataclass(frozen=True)
class Blocks:
    """A range of positions: ``count`` blocks ``start, start + step, ...`` of ``size`` tokens.

    ``Blocks(7, 1, 100)`` are the tokens 7 to 106; ``Blocks(3, 16, 5, 64)`` are five blocks of 64
    tokens, every sixteenth block from the third on.
    """

    start: int
    step: int
    count: int
    size: int = 1

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.count * self.size

    @property
    def first_position(self) -> int:
        """The position of the first token."""
        return self.start * self.size

    @property
    def end_position(self) -> int:
        """The position after the last token."""
        return (self.start + (self.count - 1) * self.step + 1) * self.size

    @property
    def is_contiguous(self) -> bool:
        """Whether the blocks are side by side."""
        return self.step == 1

    def contiguous_parts(self) -> list["Blocks"]:
        """Return this range itself if its blocks are side by side, else each block alone."""
        if self.is_contiguous:
            return [self]
        return [Blocks(self.start + n * self.step, 1, 1, self.size) for n in range(self.count)]

    def positions(self) -> np.ndarray:
        """Return the positions of all tokens, ascending: int64 ``[count * size]``."""
        blocks = self.start + self.step * np.arange(self.count)
        return (blocks[:, None] * self.size + np.arange(self.size)).reshape(-1)


@dataclass(frozen=True)
class Rule:
    """Query ``i`` sees key ``j <= i`` if all of this holds, in blocks of ``block`` tokens.

    - ``block(i) - block(j) < reach``,
    - ``j < stop``, in tokens,
    - ``block(j) = residue (mod step)``; if ``relative``, ``block(i) - block(j) = residue`` instead.
    """

    block: int = 1
    reach: int | None = None
    stop: int | None = None
    step: int = 1
    residue: int = 0
    relative: bool = False

    @property
    def is_band(self) -> bool:
        """Whether it shows all keys up to a distance, and no others."""
        return self.step == 1 and self.stop is None

    def mask(self, queries: Any, keys: Any) -> Any:
        """Return which pairs are visible, for tensors or arrays of positions that broadcast."""
        visible = queries >= keys
        query_blocks = queries // self.block
        key_blocks = keys // self.block
        if self.reach is not None:
            visible = visible & (query_blocks - key_blocks < self.reach)
        if self.stop is not None:
            visible = visible & (keys < self.stop)
        if self.step > 1:
            phase = query_blocks - key_blocks if self.relative else key_blocks
            visible = visible & (phase % self.step == self.residue)
        return visible

    def first_key(self, query: int) -> int:
        """Return the earliest position within reach of ``query``."""
        if self.reach is None:
            return 0
        return max(0, (query // self.block - self.reach + 1) * self.block)

    def within(self, length: int) -> "Rule":
        """Return a rule that shows the same in documents of up to ``length`` tokens, with numbers
        no larger than these: what depends on a number costs no more than the document.
        """
        num_blocks = -(-length // self.block)
        # Of such stripes at most the first is in the document: in its place, or in the block after.
        has_one_stripe = self.step > num_blocks + 1
        return replace(
            self,
            reach=None if self.reach is None else min(self.reach, num_blocks + 1),
            stop=None if self.stop is None else min(self.stop, length),
            step=num_blocks + 1 if has_one_stripe else self.step,
            residue=min(self.residue, num_blocks) if has_one_stripe else self.residue,
        )

    def reach_tokens(self, length: int) -> int:
        """Return how many tokens the reach spans, at most ``length``."""
        return length if self.reach is None else min(length, self.reach * self.block)

    def implies(self, other: "Rule") -> bool:
        """Return whether this rule certainly shows every pair that ``other`` shows."""
        same_grid = (other.block, other.relative) == (self.block, self.relative)
        same_phase = other.step % self.step == 0 and other.residue % self.step == self.residue
        if self.step > 1 and not (same_grid and same_phase):
            return False
        if self.stop is not None and (other.stop is None or other.stop > self.stop):
            return False
        if self.reach is None or other.reach is None:
            return self.reach is None
        if self.block == other.block:
            return other.reach <= self.reach
        # The farthest key that `other` can show, against the nearest edge of this rule's reach.
        return other.reach * other.block - 1 <= (self.reach - 1) * self.block

    def key_blocks(self, query_start: int, query_stop: int, below: int) -> list[Blocks]:
        """Return the key blocks before position ``below`` that some query in the range sees."""
        first = self.first_key(query_start) // self.block
        stop = min(below, query_stop)
        if self.stop is not None:
            stop = min(stop, self.stop)

        if not self.relative:
            first += (self.residue - first) % self.step
            if self.step > 1:
                return _every_step(first, self.step, stop, self.block)
            start = first * self.block
            return [contiguous_blocks(start, stop, self.block)] if stop > start else []

        # Every block of queries has stripes of its own; they repeat after `step` of them.
        first_query_block = query_start // self.block
        last_query_block = (query_stop - 1) // self.block
        last_different = min(last_query_block, first_query_block + self.step - 1)
        stripes = []
        for query_block in range(first_query_block, last_different + 1):
            start = first + (query_block - self.residue - first) % self.step
            stripes += _every_step(start, self.step, stop, self.block)
        return stripes


def _every_step(start: int, step: int, stop: int, size: int) -> list[Blocks]:
    """Return every ``step``-th block from ``start`` on that begins before position ``stop``."""
    count = len(range(start, -(-stop // size), step))
    return [Blocks(start, step, count, size)] if count else []


def union_masks(masks: Iterable[Mask]) -> Mask:
    """Return the union of masks, of which there must be at least one."""
    return reduce(or_, masks)


def contiguous_blocks(start: int, stop: int, block: int) -> Blocks:
    """Return the positions from ``start`` to ``stop``, as blocks if ``start`` is an edge of one.

    The last block may then reach beyond ``stop``.
    """
    size = block if start % block == 0 else 1
    return Blocks(start // size, 1, -(-stop // size) - start // size, size)


def difference(blocks: Blocks, others: list[Blocks]) -> list[Blocks]:
    """Return what of ``blocks`` is in none of ``others``, as progressions where that is short."""
    remaining = [blocks]
    for other in others:
        remaining = [rest for part in remaining for rest in _difference(part, other)]
    return remaining


def _difference(a: Blocks, b: Blocks) -> list[Blocks]:
    if a.size != b.size:
        size = math.gcd(a.size, b.size)
        b_blocks = _split(b, size)
        return [rest for part in _split(a, size) for rest in difference(part, b_blocks)]

    # Cut `a` into progressions that `b` either misses or covers from its first block to its last.
    period = math.lcm(a.step, b.step)
    last = a.start + (a.count - 1) * a.step
    b_stop = b.start + b.count * b.step
    progressions: list[tuple[int, int]] = []  # first and last block
    for start in range(a.start, min(a.start + period, last + a.step), a.step):
        if (start - b.start) % b.step:
            progressions.append((start, last))
        else:
            periods_to_skip = -(-(b_stop - start) // period)
            progressions.append((start, min(last, b.start - 1)))
            progressions.append((max(start, start + periods_to_skip * period), last))
    return [
        Blocks(start, period, (last - start) // period + 1, a.size)
        for start, last in progressions
        if start <= last
    ]


def _split(blocks: Blocks, size: int) -> list[Blocks]:
    """Return the same positions in blocks of ``size``, which divides theirs."""
    parts = blocks.size // size
    if blocks.is_contiguous:
        return [Blocks(blocks.start * parts, 1, blocks.count * parts, size)]
    return [
        Blocks(blocks.start * parts + part, blocks.step * parts, blocks.count, size)
        for part in range(parts)
    ]
