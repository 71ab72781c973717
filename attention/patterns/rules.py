"""The closed form of patterns: rules, and the ranges of blocks that they show.

Rules work on torch tensors and numpy arrays alike; nothing here imports torch, so that recipes are checked at once.
"""

import math
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """Positions in blocks of ``size`` tokens: the blocks ``start, start + step, ...``, ``count`` of them.

    ``Blocks(7, 1, 100)`` are the tokens 7 to 106; ``Blocks(3, 16, 5, 64)`` five blocks of 64, every sixteenth from the third.
    """

    start: int
    step: int
    count: int
    size: int = 1

    def __len__(self) -> int:
        """Number of tokens."""
        return self.count * self.size

    def positions(self) -> np.ndarray:
        """Token positions, ascending: int64 ``[count * size]``."""
        blocks = self.start + self.step * np.arange(self.count)
        return (blocks[:, None] * self.size + np.arange(self.size)).reshape(-1)


@dataclass(frozen=True)
class Rule:
    """Key ``j`` is seen from query ``i >= j`` where all of this holds, in blocks of ``block`` tokens:

    - ``block(i) - block(j) < reach``,
    - ``j < stop``, in tokens,
    - ``block(j) = residue (mod step)``, or ``block(i) - block(j)`` where ``relative``.
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

    def mask(self, queries, keys):
        """Of positions that broadcast against each other; tensors or arrays."""
        seen = queries >= keys
        query_blocks, key_blocks = queries // self.block, keys // self.block
        if self.reach is not None:
            seen = seen & (query_blocks - key_blocks < self.reach)
        if self.stop is not None:
            seen = seen & (keys < self.stop)
        if self.step > 1:
            phase = query_blocks - key_blocks if self.relative else key_blocks
            seen = seen & (phase % self.step == self.residue)
        return seen

    def first_key(self, query: int) -> int:
        """The earliest position within reach of ``query``."""
        return (
            0 if self.reach is None else max(0, (query // self.block - self.reach + 1) * self.block)
        )

    def implies(self, other: "Rule") -> bool:
        """Whether it surely shows all that ``other`` shows."""
        grid = (other.block, other.relative) == (self.block, self.relative)
        finer = grid and other.step % self.step == 0 and other.residue % self.step == self.residue
        if not (self.step == 1 or finer) or (
            self.stop is not None and (other.stop is None or other.stop > self.stop)
        ):
            return False
        if self.reach is None or other.reach is None:
            return self.reach is None
        if self.block == other.block:
            return other.reach <= self.reach
        return other.reach * other.block - 1 <= (self.reach - 1) * self.block


def reach_tokens(rule: Rule, length: int) -> int:
    return length if rule.reach is None else min(length, rule.reach * rule.block)


def union_masks(masks):
    """The union of masks, of which there is at least one."""
    return reduce(or_, masks)


def reached(rule: Rule, query_start: int, query_stop: int, below: int) -> list[Blocks]:
    """Blocks before position ``below`` that ``rule`` shows to some query."""
    first = rule.first_key(query_start) // rule.block
    stop = min(below, query_stop) if rule.stop is None else min(below, query_stop, rule.stop)
    if not rule.relative:
        first += (rule.residue - first) % rule.step
        if rule.step == 1:
            return [run(first * rule.block, stop, 1)] if stop > first * rule.block else []
        return _progression(first, rule.step, stop, rule.block)
    found = []
    last = (query_stop - 1) // rule.block
    for block in range(
        query_start // rule.block, min(last, query_start // rule.block + rule.step - 1) + 1
    ):
        start = first + (block - rule.residue - first) % rule.step
        found += _progression(start, rule.step, stop, rule.block)
    return found


def _progression(start: int, step: int, stop: int, size: int) -> list[Blocks]:
    count = len(range(start, -(-stop // size), step))
    return [Blocks(start, step, count, size)] if count else []


def run(start: int, stop: int, block: int) -> Blocks:
    """The positions from ``start`` to ``stop``, in blocks where the edges are theirs; the last may reach beyond ``stop``."""
    size = block if start % block == 0 else 1
    return Blocks(start // size, 1, -(-stop // size) - start // size, size)


def difference(blocks: Blocks, others: list[Blocks]) -> list[Blocks]:
    """Those of ``blocks`` that are in none of ``others``, as progressions where that is short."""
    parts = [blocks]
    for other in others:
        parts = [rest for part in parts for rest in _difference(part, other)]
    return parts


def _difference(a: Blocks, b: Blocks) -> list[Blocks]:
    if a.size != b.size:  # in blocks of the smaller size
        size = math.gcd(a.size, b.size)
        return [rest for x in _split(a, size) for rest in difference(x, _split(b, size))]
    period = math.lcm(a.step, b.step)
    found = []
    for start in range(a.start, min(a.start + period, a.start + a.count * a.step), a.step):
        last = a.start + (a.count - 1) * a.step
        if (start - b.start) % b.step:
            found.append((start, last))
        else:  # what is before b and what comes after it
            found += [
                (start, min(last, b.start - 1)),
                (
                    max(start, start + -(-(b.start + b.count * b.step - start) // period) * period),
                    last,
                ),
            ]
    return [
        Blocks(start, period, (last - start) // period + 1, a.size)
        for start, last in found
        if start <= last
    ]


def _split(blocks: Blocks, size: int) -> list[Blocks]:
    parts = blocks.size // size
    if blocks.step == 1:
        return [Blocks(blocks.start * parts, 1, blocks.count * parts, size)]
    return [
        Blocks(blocks.start * parts + part, blocks.step * parts, blocks.count, size)
        for part in range(parts)
    ]
