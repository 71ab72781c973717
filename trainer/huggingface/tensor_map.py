"""Which rows of a parameter of ours are which tensor of another model, in both directions."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMap:
    """One of our parameters, by its global name, and what another model calls its rows."""

    ours: str
    theirs: dict[str, np.ndarray | None]
    """Of each of their tensors the rows of ours that it has, in its order; None for all as they are."""
    shift: float = 0.0
    """Theirs are ours and this: norms whose weight is one plus theirs."""
    channels: bool = False
    """Whether theirs has a dim of one after the first (``Conv1d`` by channel)."""
    entry: int | None = None
    """Where theirs is a stack of matrices, the place of this one."""

    def split(self, whole: "Tensor") -> "dict[str, Tensor]":
        """Theirs, of ours."""
        found = {name: whole if rows is None else whole[rows] for name, rows in self.theirs.items()}
        return {name: self._as_theirs(part) for name, part in found.items()}

    def own(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Of all their tensors the parts that are rows of this parameter."""
        return {
            name: tensors[name] if self.entry is None else tensors[name][self.entry]
            for name in self.theirs
        }

    def join(self, parts: "Mapping[str, Tensor]", shape: Iterable[int]) -> "Tensor":
        """Ours, of the parts that :meth:`split` or :meth:`own` gives; rows that theirs have not (the vocabulary's padding) are
        zeros.

        Raises:
            ValueError: naming one of theirs whose shape is another.
        """
        import torch

        whole = torch.zeros(tuple(shape))
        for name, rows in self.theirs.items():
            part, place = parts[name], slice(None) if rows is None else rows
            expected = self._as_theirs(whole[place]).shape
            if part.shape != expected:
                raise ValueError(f"{name} is {list(part.shape)}, the recipe needs {list(expected)}")
            whole[place] = (part.squeeze(1) if self.channels else part).to(whole.dtype) - self.shift
        return whole

    def _as_theirs(self, part: "Tensor") -> "Tensor":
        part = part + self.shift if self.shift else part
        return part.unsqueeze(1) if self.channels else part.contiguous()


@dataclass
class StackedTensors:
    """Their tensors, as ours come one by one."""

    tensors: "dict[str, Tensor]" = field(default_factory=dict)
    stacks: "dict[str, dict[int, Tensor]]" = field(default_factory=dict)

    def add(self, rows: TensorMap, whole: "Tensor") -> None:
        for name, part in rows.split(whole).items():
            if rows.entry is None:
                self.tensors[name] = part
            else:
                self.stacks.setdefault(name, {})[rows.entry] = part

    def all(self) -> "dict[str, Tensor]":
        import torch

        while self.stacks:  # one at a time, so that nothing is held twice
            name, parts = self.stacks.popitem()
            self.tensors[name] = torch.stack([parts[place] for place in sorted(parts)])
        return self.tensors


def by_layer(rows: Iterable[TensorMap]) -> Iterator[list[TensorMap]]:
    """Those of one layer after another, and of what is in no layer one by one."""
    for _, grouped in groupby(rows, key=lambda each: each.ours.split(".")[:3]):
        yield list(grouped)


def parts_of(groups: int, sizes: Iterable[int]) -> list[np.ndarray]:
    """Rows of a fused matrix: of ``groups`` alike, each with parts of ``sizes``; of each part its rows in all groups,
    ``[groups, size]``.
    """
    ends = np.cumsum(list(sizes))
    return np.split(np.arange(groups * ends[-1]).reshape(groups, -1), ends[:-1], axis=1)
