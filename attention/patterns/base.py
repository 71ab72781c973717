"""What every pattern answers: the base classes, and the union ``a | b``.

KV heads are counted from the head given to ``from_head``, 0 at first: a rank that owns heads 4..7
of the model asks for ``pattern.from_head(4)`` and gets the masks of the model on one device.
Positions count from the start of a document.

Nothing here imports torch at import time, so that checking a recipe stays fast.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from .rules import Blocks, Rule, contiguous_blocks, difference, union_masks

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(ABC):
    """Which keys each query sees, for every KV head; ``a | b`` shows what either shows.

    Subclasses are frozen dataclasses. Most derive from :class:`ClosedFormPattern`, which needs only
    the method ``rules``.
    """

    @property
    def alignment(self) -> int:
        """Documents must start at multiples of this, so that the pattern's blocks line up."""
        return 1

    def check(self, num_kv_heads: int, length: int) -> None:  # noqa: B027 - most have no limits
        """Raise ValueError if the pattern cannot have that many heads, or tokens in a document."""

    def check_batch(self, batch_size: int) -> None:  # noqa: B027 - most have no limits
        """Raise ValueError if the pattern was made for a batch of another size."""

    def in_document(self, batch_rows: slice, start: int, stop: int) -> Pattern:
        """Return the pattern of one document: tokens ``start`` to ``stop`` of some batch rows."""
        return self

    @abstractmethod
    def from_head(self, first: int) -> Self:
        """Return the same pattern for KV heads ``first, first + 1, ...``."""

    def spread(self, num_kv_heads: int) -> Self:
        """Return the pattern with its stripes spread evenly over all KV heads of the model.

        Stripes whose ``head_step`` was given stay where they are.
        """
        return self

    @abstractmethod
    def mask(self, query_positions: Any, key_positions: Any, num_kv_heads: int) -> Tensor:
        """Return the visible pairs: bool tensor ``[num_kv_heads, queries, keys]``.

        This is the definition of the pattern, and the oracle of every backend.
        """

    @abstractmethod
    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        """Return the key blocks that KV head ``head`` needs.

        They hold all keys that some query in ``[query_start, query_stop)`` sees; the mask may still
        hide others among them. They are disjoint, and ascending within each range.
        """

    @abstractmethod
    def visible_keys(self, length: int, head: int) -> np.ndarray:
        """Return how many keys each query of a document sees: int64 ``[length]``."""

    def visible_pairs(self, length: int, head: int) -> int:
        """Return how many pairs of query and key are visible in a document of ``length`` tokens."""
        return int(self.visible_keys(length, head).sum())

    def density(self, length: int, num_kv_heads: int = 1) -> float:
        """Return the visible share of the causal triangle of ``length`` tokens, over all heads."""
        visible = sum(self.visible_pairs(length, head) for head in range(num_kv_heads))
        return visible / (num_kv_heads * length * (length + 1) / 2)

    def every_query_sees_keys(self, num_kv_heads: int) -> bool:
        """Return whether it is certain that no query is without keys, in any head."""
        return False

    @abstractmethod
    def covers(self, num_kv_heads: int) -> bool:
        """Return whether at least one head sees each earlier position, however far away it is."""

    def __or__(self, other: Pattern) -> Union:
        if not isinstance(other, Pattern):
            return NotImplemented
        return Union((self, other))

    def __repr__(self) -> str:
        """Return a call of the class; fields that have their default value are left out."""
        arguments = []
        named_arguments = []
        for field in fields(cast(Any, self)):  # its subclasses are dataclasses
            value = getattr(self, field.name)
            if field.default is MISSING:
                arguments.append(repr(value))
            elif value != field.default:
                named_arguments.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(arguments + named_arguments)})"


class ClosedFormPattern(Pattern):
    """A pattern that is, for each head, the union of a few rules."""

    @abstractmethod
    def rules(self, head: int) -> tuple[Rule, ...]:
        """Return the rules of KV head ``head``, which sees all that any of them shows."""

    def from_head(self, first: int) -> Self:
        return self  # in most patterns all heads see the same

    def in_document(self, batch_rows: slice, start: int, stop: int) -> Pattern:
        return self.within(stop - start)

    def within(self, length: int) -> Within:
        """Return the pattern for documents of up to ``length`` tokens; see :meth:`Rule.within`."""
        return Within(self, length)

    def mask(self, query_positions: Any, key_positions: Any, num_kv_heads: int) -> Tensor:
        import torch

        queries = torch.as_tensor(query_positions)[:, None]
        keys = torch.as_tensor(key_positions)
        length = int(queries.max()) + 1 if len(queries) else 1
        masks = []
        for head in range(num_kv_heads):
            rules = [rule.within(length) for rule in self.rules(head)]
            masks.append(union_masks(rule.mask(queries, keys) for rule in rules))
        return torch.stack(masks)  # [num_kv_heads, queries, keys]

    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        rules = [rule.within(query_stop) for rule in self.rules(head)]
        bands = [rule for rule in rules if rule.is_band]
        other_rules = [rule for rule in rules if not rule.is_band]
        band_start = min((rule.first_key(query_start) for rule in bands), default=query_stop)

        needed: list[Blocks] = []
        for rule in other_rules:
            for blocks in rule.key_blocks(query_start, query_stop, band_start):
                needed += difference(blocks, needed)

        # The last block below the band may reach into it.
        band_start = max([band_start, *(blocks.end_position for blocks in needed)])
        if bands and band_start < query_stop:
            block = min(rule.block for rule in rules)
            needed.append(contiguous_blocks(band_start, query_stop, block))
        return tuple(needed)

    def visible_keys(self, length: int, head: int) -> np.ndarray:
        rules = [rule.within(length) for rule in self.rules(head)]
        # Under all rules that are not relative the queries that see a key are consecutive, from the
        # key itself on. So the number of keys that a query sees is a sum of begins minus ends.
        keys = np.arange(length)
        query_end = _query_ends([rule for rule in rules if not rule.relative], keys)
        begins = np.bincount(keys, minlength=length + 1)
        ends = np.bincount(query_end, minlength=length + 1)
        change = begins - ends

        relative = [rule for rule in rules if rule.relative]
        if relative:
            change += _relative_changes(relative, keys, query_end)
        return np.cumsum(change)[:length]

    def every_query_sees_keys(self, num_kv_heads: int) -> bool:
        return _has_bands(self, num_kv_heads)

    def covers(self, num_kv_heads: int) -> bool:
        all_rules = {rule for head in range(num_kv_heads) for rule in self.rules(head)}
        unlimited = [rule for rule in all_rules if rule.reach is None and rule.stop is None]
        # A relative rule shows other keys to each query.
        fixed = [rule for rule in unlimited if not (rule.relative and rule.step > 1)]
        return _cover_everything(sorted(fixed, key=lambda rule: rule.step))


@lru_cache(maxsize=256)
def _has_bands(pattern: ClosedFormPattern, num_kv_heads: int) -> bool:
    """Return whether each head has a band, in which a query sees at least itself."""
    rules_of_heads = map(pattern.rules, range(num_kv_heads))
    return all(any(rule.is_band for rule in rules) for rules in rules_of_heads)


def _cover_everything(fixed_rules: list[Rule]) -> bool:
    """Return whether each position is in a stripe of some rule, of those with short steps first.

    What a rule leaves uncovered is kept as positions modulo the period of the rules so far; it ends
    as soon as the other rules are too few to cover that, before any period gets long.
    """
    if not fixed_rules:
        return False
    unit = math.gcd(*(rule.block for rule in fixed_rules))
    period = 1  # in units
    uncovered = np.zeros(1, np.int64)
    shares = [1 / rule.step for rule in fixed_rules]
    for number, rule in enumerate(fixed_rules):
        if sum(shares[number:]) < (1 - 1e-9) * len(uncovered) / period:
            return False
        size = rule.block // unit
        longer_period = math.lcm(period, size * rule.step)
        repeated = np.arange(0, longer_period, period)[:, None] + uncovered
        uncovered = repeated[repeated // size % rule.step != rule.residue]
        period = longer_period
        if not len(uncovered):
            return True
    return False


def _query_ends(fixed_rules: list[Rule], keys: np.ndarray) -> np.ndarray:
    """Return for each key the position after the last query that sees it; its own if none does."""
    length = len(keys)
    query_end = keys.copy()
    for rule in fixed_rules:
        rule_end = np.full(length, length)
        if rule.reach is not None:
            rule_end = np.minimum(rule_end, (keys // rule.block + rule.reach) * rule.block)
        shown = keys // rule.block % rule.step == rule.residue
        if rule.stop is not None:
            shown &= keys < rule.stop
        query_end = np.where(shown, np.maximum(query_end, rule_end), query_end)
    return query_end


def _relative_changes(relative: list[Rule], keys: np.ndarray, query_end: np.ndarray) -> np.ndarray:
    """Return what relative rules add: begins minus ends of queries from ``query_end`` on.

    They are found for one block of queries at a time, at each distance from the keys' own block.
    """
    length = len(keys)
    block = min(rule.block for rule in relative)
    farthest = max(rule.reach_tokens(length) // block for rule in relative)
    change = np.zeros(length + 1, np.int64)
    for distance in range(min(-(-length // block), farthest + 1)):
        query_block = keys // block + distance
        first = np.maximum(query_block * block, query_end)
        last = np.minimum((query_block + 1) * block, length)
        sees = union_masks(rule.mask(np.maximum(first, keys), keys) for rule in relative)
        sees &= first < last
        change += np.bincount(first[sees], minlength=length + 1)
        change -= np.bincount(last[sees], minlength=length + 1)
    return change


@dataclass(frozen=True, repr=False)
class Within(ClosedFormPattern):
    """A pattern for documents of up to ``length`` tokens."""

    pattern: ClosedFormPattern
    length: int

    @property
    def alignment(self) -> int:
        return self.pattern.alignment

    def check(self, num_kv_heads: int, length: int) -> None:
        self.pattern.check(num_kv_heads, length)

    def from_head(self, first: int) -> Self:
        return replace(self, pattern=self.pattern.from_head(first))

    def spread(self, num_kv_heads: int) -> Self:
        return replace(self, pattern=self.pattern.spread(num_kv_heads))

    def rules(self, head: int) -> tuple[Rule, ...]:
        return tuple(rule.within(self.length) for rule in self.pattern.rules(head))

    def __repr__(self) -> str:
        return repr(self.pattern)


@dataclass(frozen=True, repr=False)
class Union(ClosedFormPattern):
    """All that any of the parts shows; written ``a | b``."""

    parts: tuple[ClosedFormPattern, ...]

    def __init__(self, parts: tuple[Pattern, ...]):
        flat: list[ClosedFormPattern] = []
        for part in parts:
            if isinstance(part, Union):
                flat += part.parts
            elif isinstance(part, ClosedFormPattern):
                flat.append(part)
            else:
                raise ValueError(
                    f"{type(part).__name__} has no closed form and cannot be part of a union: "
                    "list its blocks too"
                )
        object.__setattr__(self, "parts", tuple(flat))

    @property
    def alignment(self) -> int:
        return max(part.alignment for part in self.parts)

    def check(self, num_kv_heads: int, length: int) -> None:
        for part in self.parts:
            part.check(num_kv_heads, length)

    def from_head(self, first: int) -> Self:
        return replace(self, parts=tuple(part.from_head(first) for part in self.parts))

    def spread(self, num_kv_heads: int) -> Self:
        return replace(self, parts=tuple(part.spread(num_kv_heads) for part in self.parts))

    def rules(self, head: int) -> tuple[Rule, ...]:
        """Return the rules of all parts without those that another one implies."""
        kept: list[Rule] = []
        for part in self.parts:
            for rule in part.rules(head):
                if any(other.implies(rule) for other in kept):
                    continue
                kept = [other for other in kept if not rule.implies(other)]
                kept.append(rule)
        return tuple(kept)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))
