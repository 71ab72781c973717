"""The patterns: small frozen values, one answer per KV head.

``S2(64, 16, 16) | Sinks(4)`` is a pattern, and so is ``PerHead([Window(512), Causal()])``. Each of
them is, for every head, a union of a few rules: that closed form is all that the kernels read.
A pattern that a recipe may name also has a line in ``PATTERNS`` of ``expression.py``.

Nothing here imports torch, so that checking a recipe stays fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from ..errors import InvalidField, check_at_least, check_power_of_two
from .base import ClosedFormPattern, Pattern, Union
from .rules import Rule


@dataclass(frozen=True, repr=False)
class Causal(ClosedFormPattern):
    """Every query sees itself and all earlier tokens."""

    def rules(self, head: int) -> tuple[Rule, ...]:
        return (Rule(),)


@dataclass(frozen=True, repr=False)
class Window(ClosedFormPattern):
    """The last ``tokens`` tokens, including the query's own."""

    tokens: int

    def __post_init__(self) -> None:
        check_at_least("Window", "tokens", self.tokens, 1)

    def rules(self, head: int) -> tuple[Rule, ...]:
        return (Rule(reach=self.tokens),)


@dataclass(frozen=True, repr=False)
class Sinks(ClosedFormPattern):
    """The first ``tokens`` tokens of the document (StreamingLLM, arXiv 2309.17453)."""

    tokens: int

    def __post_init__(self) -> None:
        check_at_least("Sinks", "tokens", self.tokens, 1)

    def rules(self, head: int) -> tuple[Rule, ...]:
        return (Rule(stop=self.tokens),)


@dataclass(frozen=True, repr=False)
class Dilated(ClosedFormPattern):
    """Dilated neighborhoods: the query's own block, and every ``dilation``-th before it.

    There are ``count`` blocks in all.
    """

    block: int
    dilation: int
    count: int

    def __post_init__(self) -> None:
        check_power_of_two("Dilated", "block", self.block)
        check_at_least("Dilated", "dilation", self.dilation, 1)
        check_at_least("Dilated", "count", self.count, 1)

    @property
    def alignment(self) -> int:
        return self.block

    def rules(self, head: int) -> tuple[Rule, ...]:
        reach = (self.count - 1) * self.dilation + 1
        return (Rule(self.block, reach, step=self.dilation, relative=self.dilation > 1),)


class _Striped(ClosedFormPattern):
    """Base of the patterns with stripes, which checks the fields that place them.

    It is not a dataclass itself, because its subclasses have these fields in different orders.
    """

    block: int
    stride: int
    offset: int
    head_step: int | None
    first_head: int

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_power_of_two(owner, "block", self.block)
        check_at_least(owner, "stride", self.stride, 1)
        check_at_least(owner, "offset", self.offset, 0)
        check_at_least(owner, "first_head", self.first_head, 0)
        if self.head_step is not None:
            check_at_least(owner, "head_step", self.head_step, 0)

    @property
    def alignment(self) -> int:
        return self.block

    def from_head(self, first: int) -> Self:
        return self._replace(first_head=self.first_head + first)

    def spread(self, num_kv_heads: int) -> Self:
        if self.head_step is not None:
            return self
        return self._replace(head_step=max(1, self.stride // max(1, num_kv_heads)))

    def residue(self, head: int) -> int:
        """Return where a KV head has its stripes: the key blocks that equal this mod ``stride``."""
        step = 1 if self.head_step is None else self.head_step
        return -((self.first_head + head) * step + self.offset) % self.stride

    def _replace(self, **changes: int) -> Self:
        return replace(cast(Any, self), **changes)  # its subclasses are dataclasses


@dataclass(frozen=True, repr=False)
class Stripes(_Striped):
    """Every ``stride``-th block of keys, however far away.

    KV head ``h`` sees block ``j`` if ``j = -(h * head_step + offset) (mod stride)``. If
    ``head_step`` is None it counts as 1, until :meth:`spread` sets it to DKernel's
    ``max(1, stride // heads)``.
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
    """S2-Attention (arXiv 2407.17678): a local band of blocks, and stripes that differ per KV head.

    Query block ``i`` sees key block ``j <= i`` if ``i - j < local_blocks`` or if ``j`` is on the
    head's :class:`Stripes`; within a block attention is causal.

    Args:
        dense_heads: the first ``dense_heads`` KV heads of the model see everything (DKernel: the
            last), and the stripes of the others are placed as if these were numbered from 0.
        near: ``(blocks, stride)``, a finer stride within that many blocks; the far stripes are a
            part of the near ones (the paper's figure of several ranges).
    """

    block: int
    local_blocks: int
    stride: int
    dense_heads: int = 0
    offset: int = 0
    head_step: int | None = None
    near: tuple[int, int] | None = None
    first_head: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("S2", "local_blocks", self.local_blocks, 1)
        check_at_least("S2", "dense_heads", self.dense_heads, 0)
        if self.near is not None:
            self._check_near(self.near)

    def _check_near(self, near: tuple[int, int]) -> None:
        if not isinstance(near, tuple) or len(near) != 2:
            raise InvalidField("near", f"must be (blocks, stride), got {near!r}", "S2")
        blocks, stride = near
        if blocks <= self.local_blocks or stride < 1:
            reason = (
                f"must reach beyond the {self.local_blocks} local blocks, at a stride from 1, "
                f"got {near}"
            )
            raise InvalidField("near", reason, "S2")
        if self.stride % stride:
            reason = f"has stride {stride}, which does not divide the far stride {self.stride}"
            raise InvalidField("near", reason, "S2")

    def spread(self, num_kv_heads: int) -> Self:
        return super().spread(num_kv_heads - self.dense_heads)

    def residue(self, head: int) -> int:
        return super().residue(head - self.dense_heads)

    def rules(self, head: int) -> tuple[Rule, ...]:
        if self.first_head + head < self.dense_heads or self.stride == 1:
            return (Rule(),)
        residue = self.residue(head)
        local_band = Rule(self.block, self.local_blocks)
        stripes = Rule(self.block, step=self.stride, residue=residue)
        if self.near is None:
            return (local_band, stripes)
        near_blocks, near_stride = self.near
        near_residue = residue % near_stride
        near_stripes = Rule(self.block, near_blocks, step=near_stride, residue=near_residue)
        return (local_band, stripes, near_stripes)


def Streaming(sinks: int, window: int) -> Union:  # noqa: N802 - a pattern by name, like the others
    """Return the pattern of the first ``sinks`` and the last ``window`` tokens.

    StreamingLLM, arXiv 2309.17453.
    """
    return Sinks(sinks) | Window(window)


@dataclass(frozen=True, repr=False)
class PerHead(ClosedFormPattern):
    """A pattern of its own for each KV head of the model: the ``h``-th pattern for head ``h``."""

    patterns: tuple[ClosedFormPattern, ...]
    first_head: int = 0

    def __init__(self, patterns: Iterable[Pattern], first_head: int = 0):
        object.__setattr__(self, "patterns", tuple(patterns))
        object.__setattr__(self, "first_head", first_head)
        check_at_least("PerHead", "patterns", len(self.patterns), 1)
        check_at_least("PerHead", "first_head", first_head, 0)
        for pattern in self.patterns:
            if not isinstance(pattern, ClosedFormPattern):
                reason = f"must have a closed form, got {pattern!r}"
                raise InvalidField("patterns", reason, "PerHead")

    @property
    def alignment(self) -> int:
        return max(pattern.alignment for pattern in self.patterns)

    def from_head(self, first: int) -> Self:
        return replace(self, first_head=self.first_head + first)

    def spread(self, num_kv_heads: int) -> Self:
        patterns = tuple(pattern.spread(num_kv_heads) for pattern in self.patterns)
        return replace(self, patterns=patterns)

    def check(self, num_kv_heads: int, length: int) -> None:
        if self.first_head + num_kv_heads > len(self.patterns):
            last = self.first_head + num_kv_heads - 1
            raise ValueError(
                f"PerHead has patterns for {len(self.patterns)} KV heads, but is asked for head "
                f"{last}: give one for each"
            )

    def rules(self, head: int) -> tuple[Rule, ...]:
        self.check(head + 1, 0)
        head_in_model = self.first_head + head
        return self.patterns[head_in_model].rules(head_in_model)

    def __repr__(self) -> str:
        patterns = ", ".join(map(repr, self.patterns))
        first_head = f", first_head={self.first_head}" if self.first_head else ""
        return f"PerHead([{patterns}]{first_head})"
