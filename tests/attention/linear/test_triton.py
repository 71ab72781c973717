"""Linear attention's Triton kernels without a GPU: in the interpreter, and compiled for GPUs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from ..softmax.test_triton import SHARED, python

HERE = Path(__file__).parent

SCANS = [
    "state:{}:gated",
    "out:{}:documents",
    "dv:{}:constant",
    "dq-decay:{}:documents",
    "dk-decay:{}:documents",
]
SCANS_WIDE = [
    "out:{}:constant",
    "state-back:{}:documents",
    "dq:{}:gated",
    "dk:{}:documents",
    "dk-decay:{}:documents:fp16",
]
OTHER_KERNELS = ["carry:{}:constant", "decay:{}:gated", "decay:{}:documents"]
FP32 = ["state:{}:gated:fp32", "out:{}:constant:fp32", "dk-decay:{}:documents:fp32"]
ARCHS = [90, *(pytest.param(arch, marks=pytest.mark.wide) for arch in SHARED if arch != 90)]

INTERPRETED = [["constant, documents", "per token, documents"]]
INTERPRETED_WIDE = [
    ["mutants"],
    ["no decay", "constant", "per token, resets"],
    ["one token", "63 tokens", "65 tokens", "a head for each"],
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
@pytest.mark.parametrize("dim", [pytest.param(64, marks=pytest.mark.wide), 128])
@pytest.mark.parametrize(
    "cases", [SCANS, pytest.param(SCANS_WIDE, marks=pytest.mark.wide)], ids=["most", "rest"]
)
def test_chunk_scans_compiled_ahead_of_time(arch, dim, cases):
    """Few register spills, shared memory in bounds, and the instructions of the GPU are used."""
    for kernel in compiled(arch, dim, cases):
        assert arch != 90 or kernel["wgmma"], kernel
        assert arch not in (90, 100) or kernel["tma"], kernel
        assert arch != 120 or not kernel["tma"], kernel


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "cases", [OTHER_KERNELS, pytest.param(FP32, marks=pytest.mark.wide)], ids=["others", "fp32"]
)
def test_other_kernels_compiled_ahead_of_time(arch, cases):
    compiled(arch, 128, cases)


def compiled(arch: int, dim: int, cases: list[str]) -> list[dict]:
    """Compile the cases, check their spills and shared memory, and return what each needs."""
    lines = python(HERE / "aot_worker.py", arch, *(case.format(dim) for case in cases)).splitlines()
    kernels = [json.loads(line) for line in lines]
    assert len(kernels) == len(cases)
    for kernel in kernels:
        # In fp32, which has no tensor cores, the consumer's Blackwell holds a little less.
        is_fp32_on_120 = arch == 120 and kernel["dtype"] == "fp32"
        assert kernel["spills"] <= (80 if is_fp32_on_120 else 64), kernel
        assert kernel["shared"] <= SHARED[arch], kernel
    return kernels


def test_unsupported_calls_are_refused(monkeypatch):
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
    wide_values = torch.zeros(1, 4, 2, 160)
    for arguments, reason in [
        ((x, x, x, None, x[..., 0]), "has no delta rule"),
        ((x, x, x, x, None), "one decay per head, not one per key dim"),
        ((x.double(), x.double(), x.double(), None, None), "not in torch.float64"),
        ((x, x, wide_values, None, None), "head dims up to 128, not 160"),
    ]:
        assert reason in linear_triton.unsupported_reason(*arguments)


def test_kernels_are_not_specialized_for_lengths():
    from longspan.attention.linear.triton import (
        chunk_scan_kernel,
        decay_kernel,
        state_passing_kernel,
    )

    for kernel in (chunk_scan_kernel, state_passing_kernel, decay_kernel):
        lengths = {"length", "chunks", "segments"} & set(kernel.arg_names)
        assert lengths == {
            parameter.name for parameter in kernel.params if parameter.do_not_specialize
        }


def test_segment_lengths_fill_the_gpu_within_bounds(monkeypatch):
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
