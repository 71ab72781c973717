"""The GPU that a call is judged for: the one that its tensors are on, or one that is not here."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

_assumed_capability: ContextVar[int | None] = ContextVar("assumed capability", default=None)


@contextmanager
def assumed_gpu(capability: int) -> Iterator[None]:
    """Judge calls on CUDA as on an NVIDIA GPU of this compute capability, whatever is here.

    Only for questions: tensors of such a GPU are fake, and nothing can be computed.
    """
    token = _assumed_capability.set(capability)
    try:
        yield
    finally:
        _assumed_capability.reset(token)


def compute_capability(device: torch.device) -> int:
    """Return the compute capability, 90 for 9.0; 0 for a device without CUDA.

    AMD's GPUs have numbers of their own, some of which are those of NVIDIA's.
    """
    if device.type != "cuda":
        return 0
    assumed = _assumed_capability.get()
    return _found_capability(device) if assumed is None else assumed


@lru_cache
def _found_capability(device: torch.device) -> int:
    if torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def torch_has_flash() -> bool:
    """Return whether torch's own flash-attn 2 is there, as in its builds for CUDA."""
    if _assumed_capability.get() is not None:
        return True
    return torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
