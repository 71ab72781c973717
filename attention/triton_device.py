"""What all our Triton kernels ask of the device they run on."""

import os
from collections.abc import Callable
from functools import lru_cache, wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax.triton.launch_config import CHIPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)


@lru_cache
def chip(device: torch.device) -> int:
    """Compute capability, as 90 for 9.0."""
    major, minor = (0, 0) if device.type != "cuda" else torch.cuda.get_device_capability(device)
    return major * 10 + minor


def no_device(x: Tensor) -> str | None:
    """Why no kernel can run where ``x`` is, and what can."""
    if not x.is_cuda and not INTERPRETED:
        return f"needs CUDA, but q is on {x.device}; use torch"
    if x.is_cuda and chip(x.device) not in CHIPS:
        return f"has no launch shapes for compute capability {chip(x.device) / 10}; use torch"
    return None


def aligned(*tensors: Tensor) -> bool:
    """Whether the chip's bulk copies can take rows from these, each a row of its own."""
    return all(
        x.stride(1) > 0
        and x.data_ptr() % 16 == 0
        and all(n * x.element_size() % 16 == 0 for n in x.stride()[:3])
        for x in tensors
    )


def on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device: make it that of the first tensor."""

    @wraps(function)
    def launch(x: Tensor, *rest):
        with torch.cuda.device_of(x):
            return function(x, *rest)

    return launch


def workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where the kernels lay down the descriptors of their bulk copies."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def unit_stride(x: Tensor) -> Tensor:
    """The numbers of a head beside one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def bulk_rows(
    base,
    length,
    stride,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    if TMA:
        descriptor = tl.make_tensor_descriptor(base, [length, D], [stride, 1], [SIZE, BLOCK_D])
    else:
        descriptor = base  # not used
    return descriptor
