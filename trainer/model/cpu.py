"""Megatron-core on a machine without CUDA.

Megatron-core names CUDA where it means "the device": tensors made on ``cuda``, random states of
``torch.cuda``, type names. Here those names lead to the CPU. This is applied only without CUDA, and
only to what Megatron-core uses.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_FACTORIES = (
    "arange",
    "empty",
    "full",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "empty_like",
    "full_like",
    "ones_like",
    "zeros_like",
)
"""Functions of torch that Megatron-core gives a device."""


def _on_cpu(factory: Callable) -> Callable:
    """Return a function that makes tensors, and makes those meant for CUDA on the CPU."""

    @wraps(factory)
    def make(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "cuda":
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return make


class _NoStream:
    """Stands for a CUDA stream or event, which do nothing here."""

    def __init__(self, *_, **__): ...

    def __getattr__(self, name: str):
        return lambda *_, **__: None


_TENSOR_TYPES = (
    "FloatTensor",
    "HalfTensor",
    "BFloat16Tensor",
    "LongTensor",
    "IntTensor",
    "ByteTensor",
)


def megatron_on_cpu() -> contextlib.AbstractContextManager:
    """Return a context in which Megatron-core runs on the CPU; it does nothing if there is CUDA.

    The functions that it replaces stay replaced, since without CUDA they could only fail.
    """
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    cpu = torch.device("cpu")
    cuda = cast(Any, torch.cuda)
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda device=None: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    for name in _TENSOR_TYPES:
        setattr(cuda, name, getattr(torch, name))

    # Experts are given streams and events to overlap; here everything happens in order.
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda device=None: _NoStream()

    from ..megatron_core import megatron_random

    megatron_random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = lambda state, device=None, graph_safe=False: (
        torch.set_rng_state(state)
    )
    return _replaced(_replacements())


def plain_torch() -> contextlib.AbstractContextManager:
    """Undo for a while what is done for Megatron-core, and would mislead others."""
    return _replaced([replacement.undone() for replacement in _replacements()])


class _Replacement(NamedTuple):
    """A function of torch, and what stands in its place."""

    owner: Any
    name: str
    original: Callable
    replacement: Callable

    def undone(self) -> "_Replacement":
        return self._replace(replacement=self.original)


@cache
def _replacements() -> list[_Replacement]:
    """Return what lets things be on the CPU that Megatron-core makes for CUDA, or moves there.

    These few functions are all that it needs. A mode that looks at every call of torch took a fifth
    of a small model's step.
    """
    replacements = {
        "cuda": lambda tensor, *_, **__: tensor,
        "type": _cuda_type,
    }
    return [
        *(
            _Replacement(torch, name, getattr(torch, name), _on_cpu(getattr(torch, name)))
            for name in _FACTORIES
        ),
        *(
            _Replacement(torch.Tensor, name, getattr(torch.Tensor, name), replacement)
            for name, replacement in replacements.items()
        ),
    ]


_tensor_type = torch.Tensor.type


def _cuda_type(tensor: Tensor, *args, **kwargs) -> Any:
    """Return "torch.cuda.FloatTensor", which the distributed optimizer asks for."""
    result = _tensor_type(tensor, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result


@contextlib.contextmanager
def _replaced(replacements: list[_Replacement]) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _, _ in replacements]
    for owner, name, _, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name, _, _), function in zip(replacements, before, strict=True):
            setattr(owner, name, function)
