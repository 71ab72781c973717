"""What all our Triton kernels need from the device that they run on."""

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import compute_capability

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)

SUPPORTED_CAPABILITIES = (80, 86, 89, 90, 100, 103, 120)
"""Compute capabilities that kernels have configurations for."""

Result = TypeVar("Result")


def device_unsupported_reason(x: Tensor) -> str | None:
    """Return why no kernel can run on the device of ``x``, and what can; None if one can."""
    if not x.is_cuda and not INTERPRETED:
        return f"needs CUDA, but q is on {x.device}; use torch"
    capability = compute_capability(x.device)
    if x.is_cuda and not capability:
        return "has no configurations for AMD's GPUs; use torch"
    if x.is_cuda and capability not in SUPPORTED_CAPABILITIES:
        return f"has no configurations for compute capability {capability / 10}; use torch"
    return None


def matrix_instruction(capability: int) -> str:
    """Return how a GPU multiplies matrices, by the name of its instruction.

    ``mma`` by a warp, ``wgmma`` by four warps from shared memory, ``tcgen05`` into a memory of
    its own.
    """
    if 90 <= capability < 100:
        return "wgmma"
    return "tcgen05" if 100 <= capability < 120 else "mma"


def has_bulk_copies(capability: int) -> bool:
    """Return whether kernels are to use the GPU's bulk copies (TMA).

    The consumer's Blackwell (12.0) has them, but not the products that read what they bring from
    shared memory: its registers would not suffice.
    """
    return matrix_instruction(capability) != "mma"


def fits_bulk_copies(*tensors: Tensor) -> bool:
    """Return whether the GPU's bulk copies (TMA) can load tiles of these tensors.

    The tensors are ``[batch, time, heads, dim]``. Bulk copies need addresses and strides that are
    multiples of 16 bytes, and tokens that are not repeated.
    """
    for x in tensors:
        if x.data_ptr() % 16 or not _strides_fit_bulk_copies(x.stride(), x.element_size()):
            return False
    return True


@lru_cache
def _strides_fit_bulk_copies(strides: tuple[int, ...], bytes_per_number: int) -> bool:
    return strides[1] > 0 and all(stride * bytes_per_number % 16 == 0 for stride in strides[:3])


def on_device_of_first_argument(function: Callable[..., Result]) -> Callable[..., Result]:
    """Make the device of the first tensor the current one, on which Triton launches kernels."""

    @wraps(function)
    def launch(x: Tensor, *rest) -> Result:
        with torch.cuda.device_of(x):
            return function(x, *rest)

    return launch


def table_on(table: np.ndarray, device: torch.device) -> Tensor:
    """Return an int32 copy of a table on a device, without waiting for it."""
    on_host = torch.from_numpy(table.astype(np.int32))
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def allocate_workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Return memory in which a kernel builds the descriptors of its bulk copies.

    To be given to ``triton.set_allocator``.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def tensor_descriptor(
    base,
    length,
    stride,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """Describe ``[length, D]`` at ``base`` for bulk copies of ``[SIZE, BLOCK_D]``."""
    if TMA:
        descriptor = tl.make_tensor_descriptor(base, [length, D], [stride, 1], [SIZE, BLOCK_D])
    else:
        descriptor = base  # not used
    return descriptor
