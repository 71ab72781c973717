"""Which keys a query may see: small frozen values with an algebra, one answer per KV head.

``S2(64, 16, 16) | Sinks(4)`` is a pattern, and so is ``PerHead([Window(512), Causal()])``. Every pattern but
:class:`BlockLists` is, for each head, a union of a few :class:`Rule`: that closed form is all that the kernels read.

A KV head is addressed by its index in the whole model, so a rank that owns heads 4..7 asks for ``pattern.from_head(4)``
and gets the same masks as the model on one device. Positions count from the start of a document.

Nothing here imports torch, so that recipes are checked at once.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields, replace

import numpy as np

from .rules import Blocks, Rule, difference, reach_tokens, reached, run, union_masks


class Pattern(ABC):
    """Base of all patterns; ``a | b`` shows what either shows."""

    @property
    def alignment(self) -> int:
        """Where documents must start for their blocks to be those of the sequence: at multiples of this."""
        return 1

    def check(self, num_kv_heads: int, length: int) -> None:  # noqa: B027 - most patterns take any
        """Refuse so many heads, or documents so long, with ValueError, where the pattern says nothing of them."""

    @abstractmethod
    def from_head(self, first: int) -> "Pattern":
        """The same pattern for KV heads ``first, first + 1, ...``."""

    def spread(self, num_kv_heads: int) -> "Pattern":
        """The same pattern with stripes spread evenly over that many heads (of the whole model), where they were left open."""
        return self

    @abstractmethod
    def mask(self, query_positions, key_positions, num_kv_heads: int):
        """The definition, and the oracle of every backend: bool tensor ``[num_kv_heads, queries, keys]``."""

    @abstractmethod
    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        """Key blocks that some query in ``[query_start, query_stop)`` sees through KV head ``head``.

        Disjoint, and ascending within each range. A block may hold keys that the mask then hides.
        """

    @abstractmethod
    def visible(self, length: int, head: int) -> np.ndarray:
        """How many keys each query sees in a document of ``length`` tokens: int64 ``[length]``."""

    def seen(self, length: int, head: int) -> int:
        """How many pairs of query and key it shows among ``length`` tokens."""
        return int(self.visible(length, head).sum())

    def density(self, length: int, num_kv_heads: int = 1) -> float:
        """Visible pairs as a share of the causal triangle over ``length`` tokens: the mean over heads."""
        return sum(self.seen(length, head) for head in range(num_kv_heads)) / (
            num_kv_heads * length * (length + 1) / 2
        )

    @abstractmethod
    def covers(self, num_kv_heads: int) -> bool:
        """Whether every earlier position, however far, is seen through at least one of the heads."""

    def __or__(self, other: "Pattern") -> "Pattern":
        if not isinstance(other, Pattern):
            return NotImplemented
        return Union((self, other))

    def __repr__(self) -> str:
        given = [(f, getattr(self, f.name)) for f in fields(self)]
        required = [repr(value) for f, value in given if f.default is MISSING]
        others = [
            f"{f.name}={value!r}"
            for f, value in given
            if f.default is not MISSING and value != f.default
        ]
        return f"{type(self).__name__}({', '.join([*required, *others])})"


class ClosedFormPattern(Pattern):
    """A pattern in closed form."""

    @abstractmethod
    def rules(self, head: int) -> tuple[Rule, ...]:
        """What KV head ``head`` sees: all that any of the rules shows."""

    def from_head(self, first: int) -> "Pattern":
        return self  # of most, all heads see the same

    def mask(self, query_positions, key_positions, num_kv_heads: int):
        import torch

        queries, keys = torch.as_tensor(query_positions)[:, None], torch.as_tensor(key_positions)
        return torch.stack(
            [
                union_masks(rule.mask(queries, keys) for rule in self.rules(h))
                for h in range(num_kv_heads)
            ]
        )

    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        rules = self.rules(head)
        band = min(
            (rule.first_key(query_start) for rule in rules if rule.is_band), default=query_stop
        )
        found: list[Blocks] = []
        for rule in rules:
            if not rule.is_band:
                for blocks in reached(rule, query_start, query_stop, band):
                    found += difference(blocks, found)
        # The last block below the band may reach into it.
        band = max([band, *((b.start + (b.count - 1) * b.step + 1) * b.size for b in found)])
        if any(rule.is_band for rule in rules) and band < query_stop:
            found.append(run(band, query_stop, min(rule.block for rule in rules)))
        return tuple(found)

    def visible(self, length: int, head: int) -> np.ndarray:
        # The queries that see a key are one run from it on, under every rule that is not relative.
        keys = np.arange(length)
        end, relative = keys.copy(), []
        for rule in self.rules(head):
            if rule.relative:
                relative.append(rule)
                continue
            last = np.full(length, length)
            if rule.reach is not None:
                last = np.minimum(last, (keys // rule.block + rule.reach) * rule.block)
            shown = keys // rule.block % rule.step == rule.residue
            if rule.stop is not None:
                shown &= keys < rule.stop
            end = np.where(shown, np.maximum(end, last), end)
        change = np.bincount(keys, minlength=length + 1) - np.bincount(end, minlength=length + 1)
        if relative:  # block by block of queries, those beyond the runs
            block = min(rule.block for rule in relative)
            for away in range(
                min(
                    -(-length // block),
                    max(reach_tokens(rule, length) // block for rule in relative) + 1,
                )
            ):
                first = np.maximum((keys // block + away) * block, end)
                last = np.minimum((keys // block + away + 1) * block, length)
                sees = union_masks(
                    rule.mask(np.maximum(first, keys), keys) for rule in relative
                ) & (first < last)
                change += np.bincount(first[sees], minlength=length + 1) - np.bincount(
                    last[sees], minlength=length + 1
                )
        return np.cumsum(change)[:length]

    def covers(self, num_kv_heads: int) -> bool:
        rules = {rule for h in range(num_kv_heads) for rule in self.rules(h)}
        rules = [
            rule
            for rule in rules
            if rule.reach is None and rule.stop is None and not (rule.relative and rule.step > 1)
        ]
        if sum(1 / rule.step for rule in rules) < 1:
            return False
        keys = np.arange(math.lcm(*(rule.block * rule.step for rule in rules)))
        return bool(
            union_masks(keys // rule.block % rule.step == rule.residue for rule in rules).all()
        )


def _at_least(name: str, **values: int) -> None:
    for key, (value, least) in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{name}.{key} must be a whole number of at least {least}, got {value!r}"
            )


def _power_of_two(name: str, block: int) -> None:
    _at_least(name, block=(block, 1))
    if block & (block - 1):
        nearest = 1 << block.bit_length()
        raise ValueError(
            f"{name}.block must be a power of two, got {block}; {nearest // 2} and {nearest} are the nearest"
        )


@dataclass(frozen=True, repr=False)
class Causal(ClosedFormPattern):
    """Every query sees itself and all that came before."""

    def rules(self, head: int) -> tuple[Rule, ...]:
        return (Rule(),)


@dataclass(frozen=True, repr=False)
class Window(ClosedFormPattern):
    """The last ``tokens`` tokens, the query's own among them."""

    tokens: int

    def __post_init__(self):
        _at_least("Window", tokens=(self.tokens, 1))

    def rules(self, head: int) -> tuple[Rule, ...]:
        return (Rule(reach=self.tokens),)


@dataclass(frozen=True, repr=False)
class Sinks(ClosedFormPattern):
    """The first ``tokens`` tokens of the document (StreamingLLM, arXiv 2309.17453)."""

    tokens: int

    def __post_init__(self):
        _at_least("Sinks", tokens=(self.tokens, 1))

    def rules(self, head: int) -> tuple[Rule, ...]:
        return (Rule(stop=self.tokens),)


@dataclass(frozen=True, repr=False)
class Dilated(ClosedFormPattern):
    """Of the query's own block and those before it every ``dilation``-th, ``count`` of them (dilated neighbourhoods)."""

    block: int
    dilation: int
    count: int

    def __post_init__(self):
        _power_of_two("Dilated", self.block)
        _at_least("Dilated", dilation=(self.dilation, 1), count=(self.count, 1))

    @property
    def alignment(self) -> int:
        return self.block

    def rules(self, head: int) -> tuple[Rule, ...]:
        reach = (self.count - 1) * self.dilation + 1
        return (Rule(self.block, reach, step=self.dilation, relative=self.dilation > 1),)


class _Striped(ClosedFormPattern):
    """What patterns with stripes share: the fields that place them, and :meth:`residue`."""

    def __post_init__(self):
        name = type(self).__name__
        _power_of_two(name, self.block)
        _at_least(
            name, stride=(self.stride, 1), offset=(self.offset, 0), first_head=(self.first_head, 0)
        )
        if self.head_step is not None:
            _at_least(name, head_step=(self.head_step, 0))

    @property
    def alignment(self) -> int:
        return self.block

    def from_head(self, first: int) -> Pattern:
        return replace(self, first_head=self.first_head + first)

    def spread(self, num_kv_heads: int) -> Pattern:
        return (
            self
            if self.head_step is not None
            else replace(self, head_step=max(1, self.stride // max(1, num_kv_heads)))
        )

    def residue(self, head: int) -> int:
        """Where KV head ``head`` has its stripes: it sees key blocks that are this, modulo ``stride``."""
        step = 1 if self.head_step is None else self.head_step
        return -((self.first_head + head) * step + self.offset) % self.stride


@dataclass(frozen=True, repr=False)
class Stripes(_Striped):
    """Every ``stride``-th block, however far: head ``h`` sees block ``j`` where ``j = -(h * head_step + offset) mod stride``.

    Where ``head_step`` is None it is 1, until :meth:`spread` sets it to DKernel's ``max(1, stride // heads)``.
    """

    block: int
    stride: int
    offset: int = 0
    head_step: int | None = None
    first_head: int = 0

    def rules(self, head: int) -> tuple[Rule, ...]:
        return (Rule(self.block, step=self.stride, residue=self.residue(head)),)


@dataclass(frozen=True, repr=False)
class S2(_Striped):
    """S2-Attention (arXiv 2407.17678): a local band of blocks and vertical stripes that differ per KV head.

    Block ``i`` of queries sees block ``j <= i`` of keys where ``i - j < local_blocks`` or ``j`` is on the head's
    :class:`Stripes`; causal within a block.

    Args:
        dense_heads: the first so many heads of the model see everything (DKernel: the last), the others take the stripes
            as if they were numbered from 0.
        near: ``(blocks, stride)``: within so many blocks a finer stride, of which the other stripes are a part (the
            paper's figure of several ranges).
    """

    block: int
    local_blocks: int
    stride: int
    dense_heads: int = 0
    offset: int = 0
    head_step: int | None = None
    near: tuple[int, int] | None = None
    first_head: int = 0

    def __post_init__(self):
        super().__post_init__()
        _at_least("S2", local_blocks=(self.local_blocks, 1), dense_heads=(self.dense_heads, 0))
        if self.near is not None:
            if not isinstance(self.near, tuple) or len(self.near) != 2:
                raise ValueError(f"S2.near must be (blocks, stride), got {self.near!r}")
            blocks, stride = self.near
            if blocks <= self.local_blocks or stride < 1:
                raise ValueError(
                    f"S2.near must reach beyond the {self.local_blocks} local blocks, at a stride from 1, got {self.near}"
                )
            if self.stride % stride:
                raise ValueError(
                    f"S2.near has stride {stride}, which does not divide the far stride {self.stride}"
                )

    def spread(self, num_kv_heads: int) -> Pattern:
        return super().spread(num_kv_heads - self.dense_heads)

    def residue(self, head: int) -> int:
        return super().residue(head - self.dense_heads)

    def rules(self, head: int) -> tuple[Rule, ...]:
        if self.first_head + head < self.dense_heads or self.stride == 1:
            return (Rule(),)
        residue = self.residue(head)
        found = (
            Rule(self.block, self.local_blocks),
            Rule(self.block, step=self.stride, residue=residue),
        )
        if self.near is not None:
            blocks, stride = self.near
            found += (Rule(self.block, blocks, step=stride, residue=residue % stride),)
        return found


def Streaming(sinks: int, window: int) -> Pattern:  # noqa: N802 - a pattern by name, like the others
    """The first ``sinks`` tokens and the last ``window`` (StreamingLLM, arXiv 2309.17453)."""
    return Sinks(sinks) | Window(window)


@dataclass(frozen=True, repr=False)
class Union(ClosedFormPattern):
    """What any of the parts shows; written ``a | b``."""

    parts: tuple[Pattern, ...]

    def __post_init__(self):
        parts = tuple(
            x for part in self.parts for x in (part.parts if isinstance(part, Union) else (part,))
        )
        for part in parts:
            if not isinstance(part, ClosedFormPattern):
                raise ValueError(
                    f"{type(part).__name__} has no closed form and cannot be part of a union: list its blocks too"
                )
        object.__setattr__(self, "parts", parts)

    @property
    def alignment(self) -> int:
        return max(part.alignment for part in self.parts)

    def check(self, num_kv_heads: int, length: int) -> None:
        for part in self.parts:
            part.check(num_kv_heads, length)

    def from_head(self, first: int) -> Pattern:
        return Union(tuple(part.from_head(first) for part in self.parts))

    def spread(self, num_kv_heads: int) -> Pattern:
        return Union(tuple(part.spread(num_kv_heads) for part in self.parts))

    def rules(self, head: int) -> tuple[Rule, ...]:
        found: list[Rule] = []
        for rule in (rule for part in self.parts for rule in part.rules(head)):
            if not any(kept.implies(rule) for kept in found):
                found = [kept for kept in found if not rule.implies(kept)] + [rule]
        return tuple(found)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


@dataclass(frozen=True, repr=False)
class PerHead(ClosedFormPattern):
    """Another pattern for each KV head of the model: the ``h``-th for head ``h``."""

    patterns: tuple[Pattern, ...]
    first_head: int = 0

    def __post_init__(self):
        object.__setattr__(self, "patterns", tuple(self.patterns))
        _at_least("PerHead", patterns=(len(self.patterns), 1), first_head=(self.first_head, 0))
        for pattern in self.patterns:
            if not isinstance(pattern, ClosedFormPattern):
                raise ValueError(f"PerHead.patterns must have a closed form, got {pattern!r}")

    @property
    def alignment(self) -> int:
        return max(pattern.alignment for pattern in self.patterns)

    def from_head(self, first: int) -> Pattern:
        return replace(self, first_head=self.first_head + first)

    def spread(self, num_kv_heads: int) -> Pattern:
        return replace(
            self, patterns=tuple(pattern.spread(num_kv_heads) for pattern in self.patterns)
        )

    def check(self, num_kv_heads: int, length: int) -> None:
        if self.first_head + num_kv_heads > len(self.patterns):
            last = self.first_head + num_kv_heads - 1
            raise ValueError(
                f"PerHead has patterns for {len(self.patterns)} KV heads, but is asked for head {last}: give one for each"
            )

    def rules(self, head: int) -> tuple[Rule, ...]:
        self.check(head + 1, 0)
        at = self.first_head + head
        return self.patterns[at].rules(at)

    def __repr__(self) -> str:
        first = f", first_head={self.first_head}" if self.first_head else ""
        return f"PerHead([{', '.join(map(repr, self.patterns))}]{first})"
