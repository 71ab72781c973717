"""Triton's launches, recorded instead of made."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .recorder import Recorder

_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class CompiledVariants:
    """The kernels that Triton would compile: a new one for each kind of arguments."""

    def __init__(self) -> None:
        self.of_kernel: dict[str, set[tuple]] = {}


def record_launches(recorder: Recorder) -> CompiledVariants:
    """Replace launches of Triton kernels, in this process, by records of them."""
    from triton.runtime.jit import JITFunction, KernelInterface

    variants = CompiledVariants()

    def launcher(kernel: Any, grid: Any) -> Callable:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            name = kernel.fn.__name__
            recorder.triton_kernel(name)
            _check(recorder, name, grid(arguments) if callable(grid) else grid, arguments)
            variants.of_kernel.setdefault(name, set()).add(_variant(kernel, arguments))

        return launch

    KernelInterface.__getitem__ = launcher
    JITFunction.__getitem__ = launcher
    return variants


def _check(recorder: Recorder, name: str, grid: Any, arguments: dict[str, Any]) -> None:
    """Record what the launch would fail of."""
    sizes = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
    if any(size > limit for size, limit in zip(sizes, _GRID_LIMITS, strict=False)):
        recorder.fault(f"{name}: the grid {sizes} exceeds {_GRID_LIMITS}")
    if min(sizes) < 1:
        recorder.fault(f"{name}: the grid {sizes} is empty")
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_cuda:
            recorder.fault(f"{name}: {argument} is on {value.device}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            recorder.fault(f"{name}: {argument} is {value}, more than 64 bits")


def _variant(kernel: Any, arguments: dict[str, Any]) -> tuple:
    """Return what Triton compiles a kernel anew for, as it looks at arguments by default."""
    unspecialized = getattr(kernel, "do_not_specialize", ())
    constants = {each.name for each in kernel.params if each.is_constexpr}
    kinds: list[tuple] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            is_aligned = value.storage_offset() * value.element_size() % 16 == 0
            kinds.append((name, value.dtype, is_aligned))
        elif name in constants or name not in kernel.arg_names or value is None:
            kinds.append((name, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            bits = 32 if -(2**31) <= value < 2**31 else 64
            divides = value % 16 == 0, value == 1
            kinds.append((name, bits, None if name in unspecialized else divides))
        else:
            kinds.append((name, type(value)))
    return tuple(kinds)
