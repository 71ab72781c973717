"""Which tile, and which part of it, each program of a launch is of: tables made once a batch."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...patterns import Blocks
from ..tile_batch import TileBatch
from .rule_table import RuleTable
from .rules import K_LEN, Q_LEN, Q_START

_MAX_SPLITS = 8
"""The queries of a far tile of keys are shared among at most this many programs."""
_MIN_TILES_PER_SPLIT = 16
"""Each of these programs has at least this many tiles of queries, if all of them see the keys."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tiles of a batch are, row by row of the batch, as the kernels read it."""

    table: np.ndarray
    """int64 ``[places, PLACE_COLUMNS]``: see :mod:`.rules`."""
    key_ranges: tuple[Blocks, ...]
    """The different ranges of keys, without their lengths if the keys are side by side."""
    first_keys: np.ndarray
    """Position of the first key of each place: int64 ``[places]``."""
    key_step: int
    """Between the blocks of keys, and ..."""
    key_size: int
    """... their size; 1 and 1 for keys that are side by side."""

    @classmethod
    def of(cls, tiles: TileBatch) -> "Places":
        """Return those of a batch, without tiles that have no queries or no keys."""
        rows = []
        first_keys = []
        number_of_range: dict[Blocks, int] = {}
        for place in tiles.places:
            keys = place.k_positions
            if not len(keys):
                continue
            is_contiguous = keys.is_contiguous
            key_range = Blocks(keys.first_position, 1, 1) if is_contiguous else keys
            number = number_of_range.setdefault(key_range, len(number_of_range))
            first_key = keys.first_position if is_contiguous else keys.start
            q_slot = place.query_slots.start
            for queries in place.q_positions.contiguous_parts():
                for batch_row in range(place.batch.start, place.batch.stop):
                    of_queries = (batch_row, q_slot, queries.first_position, len(queries))
                    of_keys = (place.key_columns.start, first_key, len(keys), number)
                    rows.append(of_queries + of_keys)
                    first_keys.append(keys.first_position)
                q_slot += len(queries)
        table = np.array(rows, np.int64).reshape(-1, 8)
        with_queries = table[:, Q_LEN.value] > 0
        first_keys_of_places = np.array(first_keys, np.int64)
        any_keys = next(iter(number_of_range), Blocks(0, 1, 1))
        side_by_side = any_keys.is_contiguous
        return cls(
            table[with_queries],
            tuple(number_of_range),
            first_keys_of_places[with_queries],
            1 if side_by_side else any_keys.step,
            1 if side_by_side else any_keys.size,
        )

    @cached_property
    def _longest_first(self) -> np.ndarray:
        """Places with the largest work for a program first: the last programs even out the end."""
        return np.argsort(
            -(self.table[:, Q_START.value] + self.table[:, Q_LEN.value]), kind="stable"
        )

    def query_programs(self, tile: int) -> np.ndarray:
        """Return a program for each tile of ``tile`` queries: int32 ``[programs, columns]``.

        Tiles begin at multiples of their size in the document. Of each place the last come first,
        as they see most keys.
        """
        starts = self.table[:, Q_START.value]
        counts = -(-(starts % tile + self.table[:, Q_LEN.value]) // tile)
        place, part = _expand(self._longest_first, counts)
        return _programs(place, counts[place] - 1 - part)

    def key_programs(self, tile: int) -> np.ndarray:
        """Return a program for each tile of ``tile`` keys: int32 ``[programs, columns]``."""
        counts = -(-self.table[:, K_LEN.value] // tile)
        return _programs(*_expand(self._longest_first, counts))

    def far_programs(
        self, rules: RuleTable, far: int, query_tile: int, key_tile: int
    ) -> np.ndarray:
        """Return programs for each tile of keys of a far rule: int32 ``[programs, columns]``.

        A sixteenth of the keys can hold most of the work, so several programs may share the queries
        of a tile.
        """
        ranges = self.table[:, -1]
        num_keys = self.table[:, K_LEN.value]
        counts = rules.num_far_tiles(far, ranges, self.first_keys, num_keys, key_tile)

        # Enough work for each split, and together no more memory than the keys take in fp32.
        busy_splits = self.table[:, Q_LEN.value] // (query_tile * _MIN_TILES_PER_SPLIT)
        most_splits = num_keys // np.maximum(1, counts * key_tile)
        splits = np.minimum(np.minimum(_MAX_SPLITS, busy_splits), most_splits).clip(1)

        place, program = _expand(self._longest_first, counts * splits)
        splits = splits[place]
        return _programs(place, program // splits, program % splits, splits)


def _expand(order: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each place as often as it counts, in an order, and the numbers of these copies."""
    place = np.repeat(order, counts[order])
    ends = np.cumsum(counts[order])
    number = np.arange(len(place)) - np.repeat(ends - counts[order], counts[order])
    return place, number


def _programs(
    place: np.ndarray,
    part: np.ndarray,
    split: np.ndarray | int = 0,
    splits: np.ndarray | int = 1,
) -> np.ndarray:
    columns = np.broadcast_arrays(place, part, split, splits)
    return np.stack(columns, 1).astype(np.int32)
