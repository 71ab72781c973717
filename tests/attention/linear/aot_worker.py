"""Compile linear attention's kernels ahead of time and print their resources as JSON lines.

Each case runs forward and backward on the CPU, with a kernel's launches recorded instead of made:
what is compiled is what the backend would launch on that GPU. Kernels of a call that differ in
nothing are compiled once.

Arguments: ARCH FAMILY:KEY_DIM:VALUE_DIM[:DTYPE] ..., or FAMILY/KERNEL to compile one of them.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import triton
from longspan.attention.linear.triton import backend, scalar, stages
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.attention.linear.recurrence import make
from tests.attention.softmax.aot_worker import kernel_resources

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {dtype: f"*{name}" for name, dtype in DTYPES.items()} | {torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages")


class Launches(list):
    """The launches, as pairs of a kernel and its arguments, constants and options by name."""

    def record(self) -> None:
        """Let launches of this process be recorded from here on."""

        def launcher(kernel, grid):
            def launch(*arguments, **keywords):
                named = dict(zip(kernel.arg_names, arguments, strict=False))
                self.append((kernel, named | keywords))

            return launch

        JITFunction.__getitem__ = launcher


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """Return what Triton would compile for the launch."""
    signature = {}
    constants = {}
    hints = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_free = not parameter.do_not_specialize
        is_one = type(value) is int and value == 1 and is_free
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[index,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            hints[index,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and is_free and value % 16 == 0:
                hints[index,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)


def compiled(arch: int, case: str) -> None:
    """Print the resources of each kernel of a case."""
    family, key_dim, value_dim, *rest = case.split(":")
    family, _, only = family.partition("/")
    (dtype,) = rest or ["bf16"]
    for module in (scalar, stages):
        module.compute_capability = lambda device: arch
        module.INTERPRETED = False
    launches = Launches()
    launches.record()
    inputs = make(
        family, 64, heads=32, key_heads=16, dim=int(key_dim), value_dim=int(value_dim), batch=1,
        dtype=torch.float32,
    )  # fmt: skip
    inputs = {
        name: x if name in ("decay", "state") else x.detach().to(DTYPES[dtype]).requires_grad_()
        for name, x in inputs.items()
    }
    arguments = {"decay": None, "beta": None} | inputs
    out, last = backend.forward(**arguments, scale=0.5, documents=None)
    torch.autograd.grad(out.sum() + last.sum(), list(inputs.values()))

    done = set()
    for kernel, arguments in launches:
        name = kernel.fn.__name__.removesuffix("_kernel")
        if only and only != name:
            continue
        options = {option: arguments[option] for option in OPTIONS if option in arguments}
        program = source(kernel, arguments)
        key = (name, program.hash(), str(options))
        if key in done:
            continue
        done.add(key)
        binary = triton.compile(program, target=GPUTarget("cuda", arch, 32), options=options)
        found = {"kernel": name, "arch": arch, "case": case, "dtype": dtype, "options": options}
        constants = {
            parameter.name: arguments[parameter.name]
            for parameter in kernel.params
            if parameter.is_constexpr
        }
        resources = kernel_resources(binary.asm["ptx"], binary)
        print(json.dumps(found | {"constants": constants} | resources), flush=True)


if __name__ == "__main__":
    for case in sys.argv[2:]:
        compiled(int(sys.argv[1]), case)
