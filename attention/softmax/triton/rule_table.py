"""A pattern as the table that the kernels read: see :mod:`.rules` for its columns."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...patterns import Blocks, ClosedFormPattern, Pattern, Rule
from ...patterns.block_lists import BlockLists
from .rules import UNLIMITED

_UNLIMITED: int = UNLIMITED.value
HeadRules = tuple[tuple[Rule, ...], ...]
"""The rules of each KV head."""


def pattern_rules(pattern: Pattern, kv_heads: int) -> HeadRules:
    """Return the rules of each head; for block lists the block, as a rule that shows nothing."""
    if isinstance(pattern, BlockLists):
        return ((Rule(pattern.block, stop=0),),) * kv_heads
    assert isinstance(pattern, ClosedFormPattern)
    return tuple(pattern.rules(head) for head in range(kv_heads))


def smallest_block(pattern: Pattern, kv_heads: int) -> int | None:
    """Return the smallest block of what comes in whole blocks; None if nothing does."""
    if isinstance(pattern, BlockLists):
        return pattern.block
    return _smallest_stripe(pattern, kv_heads)


@lru_cache(maxsize=256)
def _smallest_stripe(pattern: Pattern, kv_heads: int) -> int | None:
    rules_of_heads = pattern_rules(pattern, kv_heads)
    blocks = [rule.block for rules in rules_of_heads for rule in rules if rule.step > 1]
    return min(blocks, default=None)


@dataclass(frozen=True)
class RuleTable:
    """The rules of each KV head as the kernels read them, for each of some ranges of keys."""

    rules: np.ndarray
    """int32 ``[ranges, kv_heads, num_bands + num_far, columns]``."""
    num_bands: int
    num_fixed: int
    """Far rules whose stripes do not depend on the query."""
    num_far: int
    """Fixed and relative rules."""

    def num_far_tiles(
        self, far: int, ranges: np.ndarray, first_keys: np.ndarray, num_keys: np.ndarray, tile: int
    ) -> np.ndarray:
        """Return how many tiles of keys far rule ``far`` has in some tiles, at most over the heads.

        Args:
            ranges: of keys, by their number in the table: int ``[places]``, as is all that follows.
            first_keys: positions.
            num_keys: how many keys there are.
            tile: keys of a tile.

        Returns:
            int64 ``[places]``.
        """
        rows = self.rules[ranges, :, self.num_bands + far].astype(np.int64)  # [places, heads, ...]
        width = rows[..., _WIDTH]
        stop = rows[..., _STOP]
        num_keys = num_keys[:, None]
        if far >= self.num_fixed:  # any block of keys, from the one of the first key on
            num_stripes = _cdiv(first_keys[:, None] % width + num_keys, width)
        else:
            num_stripes = np.minimum(
                _cdiv(np.maximum(0, num_keys - rows[..., _OFFSET]), rows[..., _OFFSET_STEP]),
                _cdiv(np.maximum(0, stop - rows[..., _POSITION]), rows[..., _POSITION_STEP]),
            )
        return np.where(stop == 0, 0, num_stripes * (width // tile)).max(1)


def _cdiv(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -(-a // b)


@lru_cache(maxsize=256)
def rule_table(heads: HeadRules, ranges: tuple[Blocks, ...], key_tile: int) -> RuleTable:
    """Return the table for tiles of ``key_tile`` keys, whatever the number of keys in a range."""
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
    rows_of_heads = [
        (
            *_pad(bands[head], num_bands),
            *_pad(fixed[head], num_fixed),
            *_pad(relative[head], num_relative),
        )
        for head in range(len(heads))
    ]
    table = [
        [[_table_row(rule, keys, key_tile) for rule in rows] for rows in rows_of_heads]
        for keys in ranges
    ]
    num_far = num_fixed + num_relative
    shape = (len(ranges), len(heads), num_bands + num_far, len(_NO_RULE))
    return RuleTable(np.array(table, np.int32).reshape(shape), num_bands, num_fixed, num_far)


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
