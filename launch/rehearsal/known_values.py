"""Values of fake tensors: of those that depend on no weights and no activations.

A fake tensor has a shape and no numbers. But where documents begin, which ranks a token goes to and
the like decide what is launched and sent. So whole numbers and flags are computed for real beside
the fakes, on the CPU, as long as all that they depend on is known.
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_MAX_NUMBERS = 2**27
"""Larger results are not computed."""
_FACTORIES = {
    "aten::arange",
    "aten::empty",
    "aten::eye",
    "aten::full",
    "aten::lift_fresh",
    "aten::ones",
    "aten::scalar_tensor",
    "aten::zeros",
}
"""Operations that make tensors of nothing, and are not random."""


class KnownValues:
    """The real twins of fake tensors whose values are known."""

    def __init__(self) -> None:
        self._twins = WeakTensorKeyDictionary()
        self._spoiled: WeakSet = WeakSet()
        """Storages of twins into which something unknown was written."""

    def get(self, tensor: Tensor) -> Tensor | None:
        """Return the real tensor that stands for ``tensor``, or None if it is not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        twin = self._twins.get(tensor)
        if twin is None or twin.untyped_storage() in self._spoiled:
            return None
        return twin

    def set(self, tensor: Tensor, twin: Tensor) -> None:
        """Let ``twin``, on the CPU, stand for the fake ``tensor``."""
        assert tensor.shape == twin.shape, (tensor.shape, twin.shape)
        self._twins[tensor] = twin

    def forget(self, tensor: Tensor) -> None:
        """Let what stands for ``tensor``, and for all views of it, be unknown from here on."""
        twin = self.get(tensor)
        if twin is not None:
            self._spoiled.add(twin.untyped_storage())

    def compute(self, function: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        """Return what ``function`` gives for the twins, or None if that is not known.

        Args:
            tensors: all that are among the arguments.
        """
        schema = function._schema
        twins = [self.get(tensor) for tensor in tensors]
        is_known = all(twin is not None for twin in twins)
        if tensors:
            has_whole_numbers = any(
                twin is not None and not twin.is_floating_point() for twin in twins
            )
            is_known &= has_whole_numbers and not _is_random(function)
        else:
            dtype = kwargs.get("dtype")
            is_known = schema.name in _FACTORIES and not (dtype and dtype.is_floating_point)
        if not is_known:
            if schema.is_mutable:
                self._spoil(function, args, kwargs)
            return None

        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.get(value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        with unset_fake_temporarily():
            return function(*tree_map(real, args), **tree_map(real, kwargs))

    def keep(self, results: list[Tensor], twins: list[Tensor]) -> None:
        """Let the twins stand for the results of the same operation."""
        for result, twin in zip(results, twins, strict=True):
            if not twin.is_floating_point() and twin.numel() <= _MAX_NUMBERS:
                self.set(result, twin)

    def _spoil(self, function: Any, args: tuple, kwargs: dict) -> None:
        """Forget what stands for tensors that an operation writes something unknown to."""
        for argument in written_arguments(function, args, kwargs):
            for tensor in tree_leaves(argument):
                if isinstance(tensor, Tensor):
                    self.forget(tensor)


def written_arguments(function: Any, args: tuple, kwargs: dict) -> list[Any]:
    """Return the arguments that an operation writes to."""
    written = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            is_positional = position < len(args)
            written.append(args[position] if is_positional else kwargs.get(argument.name))
    return written


def _is_random(function: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in function.tags
