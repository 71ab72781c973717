"""What the operations share: the precision of sums, how memory lies, and checks of arguments."""

from collections.abc import Collection
from math import isfinite
from numbers import Real

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over ``x`` are computed: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def has_kernels(x: Tensor) -> bool:
    """Return whether Triton kernels are to compute what has a formula of few operations.

    torch's compiler fuses such a formula itself.
    """
    if not x.is_cuda or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    from .triton_device import device_unsupported_reason

    return device_unsupported_reason(x) is None


def with_dense_heads(x: Tensor) -> Tensor:
    """Return ``x`` with the numbers of a head side by side in memory; a copy only if needed.

    Kernels read ``[batch, time, heads, dim]`` by the strides of all dims but the last, which they
    assume to be 1, and as matrices whose tokens lie at least a head apart. Views may have neither:
    one of three projections that were packed in the last dim, an upstream gradient that is one
    number for all.
    """
    _, length, _, dim = x.shape
    has_unit_stride = x.stride(3) == 1
    has_tokens_apart = length <= 1 or x.stride(1) >= dim
    if has_unit_stride and has_tokens_apart:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def check_number(name: str, value: object) -> float:
    """Return ``value`` as a float; a tensor of one element counts as a number.

    Raises:
        ValueError: if it is no finite number, or a tensor that asks for a gradient, which none of
            the operations computes for its numbers.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        if value.requires_grad:
            raise ValueError(
                f"{name} must be a number, got a tensor that requires a gradient: none flows to "
                f"it; give {name}.item()"
            )
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def check_backend(backend: str, known: Collection[str]) -> None:
    """Raise ValueError unless ``backend`` is ``auto`` or one of the known names."""
    if backend not in ("auto", *known):
        *most, last = known
        raise ValueError(f"backend must be auto, {', '.join(most)} or {last}, got {backend!r}")


def check_dims(**tensors: Tensor) -> None:
    """Raise ValueError naming any tensor that is not 4-dimensional."""
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, time, heads, dim], got shape {tuple(tensor.shape)}"
            )
