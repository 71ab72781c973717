"""Linear attention's Triton kernels without a GPU: in the interpreter, and compiled for GPUs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from ..softmax.test_triton import SHARED, python

HERE = Path(__file__).parent

WALKS = [
    "state:{}:gated",
    "out:{}:documents",
    "dv:{}:constant",
    "dq-decay:{}:documents",
    "dk-decay:{}:documents",
]
WALKS_WIDE = [
    "out:{}:constant",
    "state-back:{}:documents",
    "dq:{}:gated",
    "dk:{}:documents",
    "dk-decay:{}:documents:fp16",
]
OTHERS = ["carry:{}:constant", "decay:{}:gated", "decay:{}:documents"]
FP32 = ["state:{}:gated:fp32", "out:{}:constant:fp32", "dk-decay:{}:documents:fp32"]
ARCHS = [90, *(pytest.param(arch, marks=pytest.mark.wide) for arch in (80, 100))]

INTERPRETED = [
    ["no decay", "constant", "per token, resets"],
    ["constant, documents", "per token, documents"],
    ["one token", "63 tokens", "65 tokens", "a head for each"],
    ["mutants"],
]
INTERPRETED_WIDE = [
    ["constant, strong", "per token", "per token, strong"],
    ["no decay, documents", "per token, documents of whole chunks", "64 tokens"],
    ["one segment", "segments of two chunks"],
    ["two heads for each key", "blocks of dims", "strided"],
]


@pytest.mark.parametrize(
    "cases",
    [*INTERPRETED, *(pytest.param(cases, marks=pytest.mark.wide) for cases in INTERPRETED_WIDE)],
    ids=", ".join,
)
def test_parity_in_the_interpreter(cases):
    python(HERE / "triton_worker.py", *cases)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "cases", [WALKS, pytest.param(WALKS_WIDE, marks=pytest.mark.wide)], ids=["most", "rest"]
)
def test_walks_compiled_ahead_of_time(arch, dim, cases):
    """Hardly any register spills, shared memory in bounds, and the chip's own instructions."""
    for found in compiled(arch, dim, cases):
        assert arch != 90 or found["wgmma"], found
        assert arch < 90 or found["tma"], found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "cases", [OTHERS, pytest.param(FP32, marks=pytest.mark.wide)], ids=["others", "fp32"]
)
def test_others_compiled_ahead_of_time(arch, cases):
    compiled(arch, 128, cases)


def compiled(arch: int, dim: int, cases: list[str]) -> list[dict]:
    found = list(
        map(
            json.loads,
            python(
                HERE / "aot_worker.py", arch, *(case.format(dim) for case in cases)
            ).splitlines(),
        )
    )
    assert len(found) == len(cases)
    for one in found:
        assert one["spills"] <= 64, one
        assert one["shared"] <= SHARED[arch], one
    return found


def test_what_it_cannot_do_is_refused(monkeypatch):
    import torch
    from longspan.attention import linear_attention, triton_device
    from longspan.attention.linear import triton as linear_triton

    x = torch.zeros(1, 4, 2, 8)
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="backend triton needs CUDA, but q is on cpu; use torch"
        ):
            linear_attention(x, x, x, backend="triton")
    monkeypatch.setattr(triton_device, "INTERPRETED", True)
    assert linear_triton.unsupported_reason(x, x, x, torch.zeros(2), None) is None
    wide = torch.zeros(1, 4, 2, 160)
    for arguments, reason in [
        ((x, x, x, None, x[..., 0]), "has no delta rule"),
        ((x, x, x, x, None), "one decay per head, not one per key dim"),
        ((x.double(), x.double(), x.double(), None, None), "not in torch.float64"),
        ((x, x, wide, None, None), "head dims up to 128, not 160"),
    ]:
        assert reason in linear_triton.unsupported_reason(*arguments)


def test_lengths_are_no_part_of_what_is_compiled():
    from longspan.attention.linear.triton import (
        chunk_scan_kernel,
        decay_kernel,
        state_passing_kernel,
    )

    for kernel in (chunk_scan_kernel, state_passing_kernel, decay_kernel):
        running = {"length", "chunks", "segments"} & set(kernel.arg_names)
        assert running == {
            parameter.name for parameter in kernel.params if parameter.do_not_specialize
        }


def test_segments_fill_the_gpu_but_are_neither_short_nor_long(monkeypatch):
    import torch
    from longspan.attention.linear import triton as linear_triton

    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("Chip", (), {"multi_processor_count": 132}),
    )

    def segment(length, programs):
        return linear_triton._segment(length, programs, torch.device("cuda"))

    assert segment(100, 32) == segment(8192, 32) == 512
    assert segment(1 << 15, 32) == 2048
    assert segment(1 << 20, 32) == segment(1 << 20, 4096) == 4096
