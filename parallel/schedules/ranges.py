"""Sets of tokens as short lists of ranges: planning must not cost more for more tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...attention.patterns import Blocks


@dataclass(frozen=True)
class Ranges:
    """The positions ``starts[i], ..., stops[i] - 1``: disjoint, ascending, none of them empty.

    Both arrays are int64 ``[ranges]``.
    """

    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> "Ranges":
        """Make ranges of ``(start, stop)`` in any order, which may touch, but not overlap."""
        not_empty = sorted(pair for pair in pairs if pair[0] < pair[1])
        edges = np.array(not_empty, np.int64).reshape(-1, 2)

        # Ranges that touch become one: an edge stays if there is a gap beside it.
        has_gap = edges[1:, 0] > edges[:-1, 1]
        is_first = np.concatenate([[True], has_gap])[: len(edges)]
        is_last = np.concatenate([has_gap, [True]])[: len(edges)]
        return cls(edges[is_first, 0], edges[is_last, 1])

    @classmethod
    def from_blocks(cls, blocks: Iterable[Blocks], origin: int = 0) -> "Ranges":
        """Make ranges of ``blocks``, whose positions count from ``origin``."""
        starts = []
        sizes = []
        for progression in blocks:
            if progression.is_contiguous:
                starts.append(np.array([progression.first_position]))
                sizes.append(np.array([len(progression)]))
            else:
                numbers = progression.start + progression.step * np.arange(progression.count)
                starts.append(numbers * progression.size)
                sizes.append(np.full(progression.count, progression.size))
        if not starts:
            return cls.from_pairs(())
        start = np.concatenate(starts) + origin
        stop = start + np.concatenate(sizes)
        order = np.argsort(start)
        return cls(start[order], stop[order])

    def __len__(self) -> int:
        """Return the number of positions."""
        return int((self.stops - self.starts).sum())

    def clip(self, start: int, stop: int) -> "Ranges":
        """Return the positions in ``[start, stop)``."""
        first = np.searchsorted(self.stops, start, "right")
        last = np.searchsorted(self.starts, stop)
        starts = self.starts[first:last]
        stops = self.stops[first:last]
        if not len(starts):
            return Ranges(starts, stops)
        return Ranges(np.maximum(starts, start), np.minimum(stops, stop))

    def count_below(self, position: int) -> int:
        """Return the number of positions before ``position``."""
        return int((np.minimum(self.stops, max(position, 0)) - self.starts).clip(0).sum())

    def split_at(self, edges: np.ndarray) -> "Ranges":
        """Return the same positions, in ranges that end wherever an edge falls inside one.

        Args:
            edges: ascending, int64 ``[edges]``.
        """
        ranges_begun = np.searchsorted(self.starts, edges, "left")
        ranges_ended = np.searchsorted(self.stops, edges, "right")
        inside = edges[ranges_begun > ranges_ended]
        if not len(inside):
            return self
        return Ranges(
            np.sort(np.concatenate([self.starts, inside])),
            np.sort(np.concatenate([self.stops, inside])),
        )

    def pairs(self) -> list[tuple[int, int]]:
        """Return the ``(start, stop)`` of each range."""
        return list(zip(self.starts.tolist(), self.stops.tolist(), strict=True))


def expand(first: np.ndarray, count: np.ndarray, step: int = 1) -> np.ndarray:
    """Return ``first[i] + step * n`` for each ``n < count[i]``, one ``i`` after another: int64."""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    number_in_run = np.arange(total) - np.repeat(ends - count, count)
    return np.repeat(first, count) + step * number_in_run


_FEWEST_BLOCKS = 3
"""Fewer ranges at equal distances are no progression: it would save nothing."""


def as_progressions(
    ranges: Sequence[tuple[int, int]], allows_progression: Callable[[int], bool]
) -> list[Blocks]:
    """Return ascending ``(start, stop)`` ranges as few :class:`Blocks`.

    Ranges that touch become one. Three or more of equal size at equal distances become a
    progression, if ``allows_progression(size)`` and they are whole blocks of that size.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))

    progressions = []
    number = 0
    while number < len(merged):
        start, stop = merged[number]
        size = stop - start
        distance = size
        if number + 1 < len(merged):
            distance = merged[number + 1][0] - start

        count = 1
        if start % size == 0 and distance % size == 0 and allows_progression(size):
            count = _equally_spaced(merged, number, distance)
        if count < _FEWEST_BLOCKS:
            count = 1
            progressions.append(Blocks(start, 1, size))
        else:
            progressions.append(Blocks(start // size, distance // size, count, size))
        number += count
    return progressions


def _equally_spaced(ranges: list[tuple[int, int]], first: int, distance: int) -> int:
    """Count the ranges from number ``first`` on that repeat it at multiples of ``distance``."""
    start, stop = ranges[first]
    count = 1
    while first + count < len(ranges):
        expected = (start + count * distance, stop + count * distance)
        if ranges[first + count] != expected:
            break
        count += 1
    return count
