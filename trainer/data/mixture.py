"""Several packed corpora, mixed in proportion to their weights."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .packing import concatenated_ranges
from .samples import Sample, Samples


class Mixture:
    """Samples drawn from several sources in proportion to their weights.

    Every 1,024 samples hold each source's share of them, evenly spread, so that the source of
    sample ``n`` is known without drawing the samples before it.
    """

    _CYCLE = 1024

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float]):
        self.sources = sources
        self._shares = np.array(weights) / sum(weights)
        self._cycle = lru_cache(maxsize=2)(self._make_cycle)
        ratios = [source.bytes_per_token for source in sources]
        self.bytes_per_token = mean_bytes_per_token(self._shares, ratios)

    def sample(self, number: int) -> Sample:
        if len(self.sources) == 1:
            return self.sources[0].sample(number)
        cycle, place = divmod(number, self._CYCLE)
        source, number_in_source = self._cycle(cycle)[place]
        return self.sources[source].sample(int(number_in_source))

    def _make_cycle(self, cycle: int) -> np.ndarray:
        """Return the source of each sample of a cycle and its number there: ``[cycle, 2]``."""
        first = self._samples_before(cycle)
        counts = self._samples_before(cycle + 1) - first  # [sources]

        # Sample k of a source that has n of them stands (k + 1/2) / n of the way through the cycle.
        sources = np.repeat(np.arange(len(counts)), counts)
        numbers = concatenated_ranges(counts)
        order = np.argsort((numbers + 0.5) / counts[sources], kind="stable")
        return np.stack([sources, numbers + first[sources]], 1)[order]

    def _samples_before(self, cycle: int) -> np.ndarray:
        """Count the samples of each source before a cycle: ``[sources]``, rounded to add up."""
        edges = np.rint(np.cumsum(self._shares) * cycle * self._CYCLE).astype(np.int64)
        edges[-1] = cycle * self._CYCLE
        return np.diff(edges, prepend=0)


def mean_bytes_per_token(shares: np.ndarray, ratios: Sequence[float | None]) -> float | None:
    """Return the mean bytes per token of several sources, or None if one does not know its own."""
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios):
        return None
    return float(np.dot(shares, known))
