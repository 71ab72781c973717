"""Compiles a Triton kernel anew, and runs it on every GPU; the process of ``longspan doctor``.

Prints a line and exits with 0, or ends with the exception that it met.
"""

import os
import tempfile
import time

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_COUNT = 64
_TARGET = 90
"""Compute capability that is compiled for where there is no GPU."""


@triton.jit
def doubling_kernel(x, out, count: tl.constexpr):
    """Write ``2 x``; both are ``[count]``."""
    index = tl.arange(0, count)
    tl.store(out + index, tl.load(x + index) * 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:  # so that nothing was compiled before
        os.environ["TRITON_CACHE_DIR"] = cache
        began = time.perf_counter()
        gpus = range(torch.cuda.device_count())
        for gpu in gpus:
            _run(gpu)
        if not gpus:
            _compile_ahead_of_time()
        seconds = time.perf_counter() - began

    where = f"runs on {len(gpus)} GPUs" if gpus else "not run, as there is no GPU"
    print(f"compiled in {seconds:.1f} s, {where}")


def _run(gpu: int) -> None:
    with torch.cuda.device(gpu):
        x = torch.arange(_COUNT, device="cuda", dtype=torch.float32)
        out = torch.empty_like(x)
        doubling_kernel[(1,)](x, out, count=_COUNT)
        if not torch.equal(out, 2 * x):
            raise RuntimeError(f"a kernel computes wrong numbers on GPU {gpu}")


def _compile_ahead_of_time() -> None:
    source = ASTSource(
        doubling_kernel, {"x": "*fp32", "out": "*fp32", "count": "constexpr"}, {"count": _COUNT}
    )
    triton.compile(source, target=GPUTarget("cuda", _TARGET, 32))


if __name__ == "__main__":
    main()
