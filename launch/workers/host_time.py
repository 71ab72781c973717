"""The process of ``longspan bench launch``: what attention's kernels cost the host, without a GPU.

Attention runs forward and backward on tiny tensors on the CPU, as it would on an H100, with the
Triton kernels' launches left out. What it asks of torch is recorded, and repeated by an autograd
function that does nothing else. The difference is our own time: what is between a model's call and
the bare launches of the same kernels.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # so that kernels need no GPU

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from ...attention import attend, gpu
from ...attention import documents as document_ids
from ...attention.patterns.expression import parse_pattern

_TOKENS = 1000
_HEAD_DIM = 16


class _Recorder(TorchDispatchMode):
    """Keeps every operation of torch that is not a view, to be called again."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.operations.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def _leave_out_launches() -> list[str]:
    """Return a list to which every launch adds its kernel's name, and nothing else happens."""
    launched: list[str] = []

    def launcher(kernel: Any, grid: Any) -> Callable:
        name = kernel.fn.__name__
        return lambda *args, **kwargs: launched.append(name)

    InterpretedFunction.__getitem__ = launcher
    return launched


def measure(pattern: str, documents: int, heads: int, kv_heads: int, repeats: int) -> dict:
    """Return numbers of launches, and microseconds of a call's forward and backward."""
    launched = _leave_out_launches()
    # As on a GPU. Kernels' modules are imported at the first call.
    vars(document_ids)["is_kept"] = lambda ids: True
    vars(gpu)["compute_capability"] = lambda device: 90
    q, k, v, grad_out = (
        torch.zeros(1, _TOKENS, count, _HEAD_DIM, dtype=torch.bfloat16)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    ids = (torch.arange(_TOKENS, dtype=torch.int32) * documents // _TOKENS)[None]
    of_heads = parse_pattern(pattern).spread(kv_heads)

    def forward() -> Tensor:
        out = attend(q, k, v, of_heads, documents=ids, backend="triton")
        assert isinstance(out, Tensor)
        return out

    def step() -> None:
        torch.autograd.grad(forward(), inputs, grad_out)

    first_seconds = _seconds(step)  # makes the tables of a batch
    launched.clear()
    with _Recorder() as forward_recorder:
        out = forward()
    with _Recorder() as backward_recorder:
        gradients = torch.autograd.grad(out, inputs, grad_out)
    num_triton = len(launched)
    operations = forward_recorder.operations, backward_recorder.operations

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            _repeat(operations[0])
            return out.detach()

        @staticmethod
        def backward(ctx, grad_out):
            _repeat(operations[1])
            return gradients

    def bare() -> None:
        torch.autograd.grad(Bare.apply(*inputs), inputs, grad_out)

    pairs = [(_seconds(step), _seconds(bare)) for _ in range(repeats)]
    return {
        "pattern": pattern,
        "documents": documents,
        "triton_launches": num_triton,
        "torch_operations": sum(map(len, operations)),
        "first_us": 1e6 * first_seconds,
        "bare_us": 1e6 * statistics.median(bare for _, bare in pairs),
        "own_us": 1e6 * statistics.median(total - bare for total, bare in pairs),
    }


def _repeat(operations: list[tuple[Any, tuple, dict]]) -> None:
    for function, args, kwargs in operations:
        function(*args, **kwargs)


def _seconds(function: Callable[[], None]) -> float:
    """Return the processor's time for a call, in which other processes do not count."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pattern", required=True)
    for name in ("--documents", "--heads", "--kv-heads", "--repeats"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(**vars(options))))


if __name__ == "__main__":
    main()
