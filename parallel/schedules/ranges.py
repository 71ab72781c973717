"""Sets of tokens as short lists of ranges: what a plan reckons with, so that its cost does not grow with the tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...attention.patterns.rules import Blocks


@dataclass(frozen=True)
class Ranges:
    """The positions ``start[i], ..., stop[i] - 1``: disjoint, ascending, none of them empty."""

    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> "Ranges":
        """From pairs that may touch or come in any order, but not overlap."""
        found = np.array(sorted(pair for pair in pairs if pair[0] < pair[1]), np.int64).reshape(
            -1, 2
        )
        inner = found[1:, 0] > found[:-1, 1]
        return cls(
            found[np.concatenate([[True], inner])[: len(found)], 0],
            found[np.concatenate([inner, [True]])[: len(found)], 1],
        )

    @classmethod
    def of_blocks(cls, blocks: Iterable[Blocks], origin: int = 0) -> "Ranges":
        """The positions of ``blocks``, which count from ``origin``."""
        starts, sizes = [], []
        for one in blocks:
            if one.step == 1:
                starts.append(np.array([one.start * one.size]))
                sizes.append(np.array([len(one)]))
            else:
                starts.append((one.start + one.step * np.arange(one.count)) * one.size)
                sizes.append(np.full(one.count, one.size))
        if not starts:
            return cls.of(())
        start = np.concatenate(starts) + origin
        order = np.argsort(start)
        return cls(start[order], (start + np.concatenate(sizes))[order])

    def __len__(self) -> int:
        """Number of positions."""
        return int((self.stop - self.start).sum())

    def clip(self, start: int, stop: int) -> "Ranges":
        """Those in ``[start, stop)``."""
        first = np.searchsorted(self.stop, start, "right")
        last = np.searchsorted(self.start, stop)
        starts, stops = self.start[first:last], self.stop[first:last]
        return (
            Ranges(np.maximum(starts, start), np.minimum(stops, stop))
            if len(starts)
            else Ranges(starts, stops)
        )

    def below(self, position: int) -> int:
        """How many positions are before ``position``."""
        return int((np.minimum(self.stop, max(position, 0)) - self.start).clip(0).sum())

    def cut(self, edges: np.ndarray) -> "Ranges":
        """The same positions, in ranges that end wherever one of ``edges``, ascending, falls inside."""
        inside = edges[
            (
                np.searchsorted(self.start, edges, "left")
                > np.searchsorted(self.stop, edges, "right")
            )
        ]
        if not len(inside):
            return self
        return Ranges(
            np.sort(np.concatenate([self.start, inside])),
            np.sort(np.concatenate([self.stop, inside])),
        )

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.start.tolist(), self.stop.tolist(), strict=True))


def expand(first: np.ndarray, count: np.ndarray, step: int = 1) -> np.ndarray:
    """``first[i] + step * n`` for ``n`` below ``count[i]``, one ``i`` after the other: int64."""
    ends = np.cumsum(count)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count, count)
    return np.repeat(first, count) + step * within


def progressions(
    ranges: Sequence[tuple[int, int]], may_step: Callable[[int], bool]
) -> list[Blocks]:
    """The same ascending ranges as :class:`Blocks`: neighbours become one, and three or more of equal size at equal distances a
    progression, where ``may_step(size)``.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    found, at = [], 0
    while at < len(merged):
        start, stop = merged[at]
        size, count = stop - start, 1
        step = merged[at + 1][0] - start if at + 1 < len(merged) else size
        if start % size == 0 and step % size == 0 and may_step(size):
            while at + count < len(merged) and merged[at + count] == (
                start + count * step,
                stop + count * step,
            ):
                count += 1
        if count < 3:
            count = 1
        found.append(
            Blocks(start // size, step // size, count, size)
            if count > 1
            else Blocks(start, 1, size)
        )
        at += count
    return found
