"""Compiles a Triton kernel for a GPU that is not here."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .attention.softmax.aot_worker import kernel_resources


def resources(kernel: Any, arch: int, constants: dict, types: dict, warps: int = 4) -> dict:
    """Return the registers, spills and shared memory of a kernel compiled for ``arch``.

    Args:
        constants: values of its ``constexpr`` arguments, and None for tensors that are left out.
        types: of its tensors and floats; all other arguments are ``i32``. Tensors, and no other
            arguments, are aligned.
    """
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    hints = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps})
    return kernel_resources(binary.asm["ptx"], binary)
