"""Megatron-core on a machine without CUDA.

Megatron-core names CUDA where it means "the device": tensors made on ``cuda``, random states of
``torch.cuda``, type names. Here those names lead to the CPU. This is applied only without CUDA, and
only to what Megatron-core uses.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, cast
from unittest.mock import patch

import torch

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
    return _cuda_means_cpu()


@contextlib.contextmanager
def _cuda_means_cpu() -> Iterator[None]:
    tensor_type = torch.Tensor.type

    def cuda_type(tensor, *args, **kwargs):
        """Return "torch.cuda.FloatTensor", which the distributed optimizer asks for."""
        result = tensor_type(tensor, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    with contextlib.ExitStack() as stack:
        for name in _FACTORIES:
            stack.enter_context(patch.object(torch, name, _on_cpu(getattr(torch, name))))
        stack.enter_context(patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor))
        stack.enter_context(patch.object(torch.Tensor, "type", cuda_type))
        yield
