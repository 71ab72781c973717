"""Which rows of a parameter of Megatron's are which Hugging Face tensor, in both directions."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMap:
    """One parameter, and the Hugging Face tensors that its rows are."""

    megatron_name: str
    """The parameter's global name."""
    hf_rows: dict[str, np.ndarray | None]
    """The rows of the parameter that each Hugging Face tensor has, in its order; None for all."""
    hf_offset: float = 0.0
    """The Hugging Face tensor is the parameter plus this: -1 for norms that multiply by one plus
    their weight."""
    hf_conv1d: bool = False
    """Whether the Hugging Face tensor has a dim of one after the first: the weight of a ``Conv1d``
    with one channel per group."""
    hf_index: int | None = None
    """Where in the Hugging Face tensor the parameter is, if that tensor stacks those of several
    experts."""

    def to_hf(self, parameter: "Tensor") -> "dict[str, Tensor]":
        """Split the whole parameter into its Hugging Face tensors, before any stacking."""
        tensors = {}
        for name, rows in self.hf_rows.items():
            selected = parameter if rows is None else parameter[rows]
            tensors[name] = self._as_hf(selected)
        return tensors

    def select(self, hf_tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return what :meth:`to_hf` would give, out of a model's Hugging Face tensors."""
        if self.hf_index is None:
            return {name: hf_tensors[name] for name in self.hf_rows}
        return {name: hf_tensors[name][self.hf_index] for name in self.hf_rows}

    def from_hf(self, tensors: "Mapping[str, Tensor]", shape: Iterable[int]) -> "Tensor":
        """Join what :meth:`to_hf` or :meth:`select` gives to the parameter of this shape, in fp32.

        Rows that no tensor has (the padding of the vocabulary) are zeros.

        Raises:
            ValueError: naming a tensor of another shape than the parameter needs.
        """
        import torch

        parameter = torch.zeros(tuple(shape))
        for name, rows in self.hf_rows.items():
            tensor = tensors[name]
            place = slice(None) if rows is None else rows
            needed = self._as_hf(parameter[place]).shape
            if tensor.shape != needed:
                raise ValueError(
                    f"{name} has the shape {list(tensor.shape)}, the recipe needs {list(needed)}"
                )
            if self.hf_conv1d:
                tensor = tensor.squeeze(1)
            parameter[place] = tensor.to(parameter.dtype) - self.hf_offset
        return parameter

    def _as_hf(self, rows: "Tensor") -> "Tensor":
        if self.hf_offset:
            rows = rows + self.hf_offset
        return rows.unsqueeze(1) if self.hf_conv1d else rows.contiguous()


@dataclass
class StackedTensors:
    """Hugging Face tensors, collected while parameters come one by one."""

    _whole: "dict[str, Tensor]" = field(default_factory=dict)
    _experts: "dict[str, dict[int, Tensor]]" = field(default_factory=dict)
    """The matrices of each tensor that is a stack, by their index."""

    def add(self, tensor_map: TensorMap, parameter: "Tensor") -> None:
        for name, tensor in tensor_map.to_hf(parameter).items():
            if tensor_map.hf_index is None:
                self._whole[name] = tensor
            else:
                self._experts.setdefault(name, {})[tensor_map.hf_index] = tensor

    def stacked(self) -> "dict[str, Tensor]":
        """Return all tensors. The matrices of stacks are given up: add no more after this."""
        import torch

        while self._experts:  # one stack at a time, so that only one is in memory twice
            name, experts = self._experts.popitem()
            self._whole[name] = torch.stack([experts[index] for index in sorted(experts)])
        return self._whole


def by_layer(tensor_maps: Iterable[TensorMap]) -> Iterator[list[TensorMap]]:
    """Yield the maps of one layer after another, and those of parameters outside of layers one by
    one.
    """

    def layer(tensor_map: TensorMap) -> list[str]:
        return tensor_map.megatron_name.split(".")[:3]  # decoder.layers.<number>

    for _, layer_maps in groupby(tensor_maps, key=layer):
        yield list(layer_maps)


def fused_rows(groups: int, sizes: Iterable[int]) -> list[np.ndarray]:
    """Return which rows of a fused matrix are which part.

    The matrix has ``groups`` alike, one after another; each has parts of ``sizes`` rows.

    Returns:
        The row numbers of each part: ``[groups, size]``.
    """
    ends = np.cumsum(list(sizes))
    rows = np.arange(groups * ends[-1]).reshape(groups, -1)  # [groups, rows of a group]
    return np.split(rows, ends[:-1], axis=1)
