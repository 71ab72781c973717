"""Linear attention's Triton kernels without a GPU: in the interpreter, and compiled for GPUs."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
import torch
from longspan.attention import triton_device
from longspan.attention.linear.triton import backend, scalar
from longspan.attention.linear.triton.pieces import pieces_of

from ..softmax.test_triton import SHARED, python
from .recurrence import FAMILIES, document_ids, make

HERE = Path(__file__).parent
STAGES = (
    "scores",
    "states",
    "outputs",
    "state_gradients",
    "score_gradients",
    "input_gradients",
)

# What a call launches on a GPU, for the kinds of decays, with the delta rule and without.
COMPILED = [
    ("scalar:{0}:{0}", 9),  # the chunk scan's roles, and two small kernels
    ("gated delta:{0}:{0}", len(STAGES)),
    ("gated delta by key:{0}:{0}", len(STAGES)),
]
COMPILED_WIDE = [
    ("constant:{0}:{0}", 9),
    ("vector:{0}:{0}", len(STAGES)),
    ("scalar:{0}:{0}:fp16", 9),
    ("gated delta:{0}:{0}:fp16", len(STAGES)),
]
FP32 = [("scalar:128:128:fp32", 9), ("gated delta by key:128:128:fp32", len(STAGES))]
ARCHS = [90, *(pytest.param(arch, marks=pytest.mark.wide) for arch in SHARED if arch != 90)]

INTERPRETED = [["constant, documents", "per token, documents"], ["gated delta by key, documents"]]
INTERPRETED_WIDE = [
    ["mutants"],
    ["no decay", "constant", "per token, resets"],
    ["one token", "63 tokens", "65 tokens", "a head for each"],
    ["constant, strong", "per token", "per token, strong"],
    ["no decay, documents", "per token, documents of whole chunks", "64 tokens"],
    ["one segment", "segments of two chunks"],
    ["two heads for each key", "blocks of dims", "strided", "large dims"],
    ["mutants of stages"],
    ["large values", "vector, one token", "delta, equal keys"],
    ["delta", "delta, documents"],
    ["gated delta", "gated delta, documents"],
    ["gated delta, strong", "gated delta, resets", "gated delta, two heads for each key"],
    ["vector", "vector, documents"],
    ["vector, strong", "vector, resets"],
    ["gated delta by key, many documents"],
    ["gated delta by key, strong", "gated delta by key, resets"],
    ["gated delta, chunks of 64", "gated delta, strided"],
    ["gated delta by key, chunks of 64"],
    ["gated delta by key, blocks of dims"],
    *([f"isolation: {family}"] for family in FAMILIES),
]


@pytest.mark.parametrize(
    "cases",
    [*INTERPRETED, *(pytest.param(cases, marks=pytest.mark.wide) for cases in INTERPRETED_WIDE)],
    ids=", ".join,
)
def test_parity_in_the_interpreter(cases):
    python(HERE / "triton_worker.py", *cases)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "dim",
    [
        pytest.param(64, marks=pytest.mark.wide),
        128,
        pytest.param(256, marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize(
    ("case", "count"),
    [
        *COMPILED[:2],
        *(pytest.param(*case, marks=pytest.mark.wide) for case in (COMPILED[2:] + COMPILED_WIDE)),
    ],
)
def test_compiled_ahead_of_time(arch, dim, case, count):
    """Few register spills, shared memory in bounds, and the instructions of the GPU are used."""
    for kernel in compiled(arch, case.format(dim), count):
        if kernel["kernel"] in STAGES:
            assert_nothing_is_computed_twice(kernel)
        if kernel["kernel"] in (*STAGES, "chunk_scan"):
            assert arch != 90 or kernel["wgmma"], kernel
        if kernel["kernel"] == "chunk_scan":
            assert arch not in (90, 100) or kernel["tma"], kernel
        assert arch != 120 or not kernel["tma"], kernel


@pytest.mark.wide
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("case", "count"), FP32)
def test_fp32_compiled_ahead_of_time(arch, case, count):
    compiled(arch, case, count)


def compiled(arch: int, case: str, count: int) -> list[dict]:
    """Compile a case, check spills and shared memory, and return what each kernel needs."""
    lines = python(HERE / "aot_worker.py", arch, case).splitlines()
    kernels = [json.loads(line) for line in lines]
    assert len(kernels) == count
    for kernel in kernels:
        # In fp32, which has no tensor cores, the consumer's Blackwell holds a little less.
        is_fp32_on_120 = arch == 120 and kernel["dtype"] == "fp32"
        assert kernel["spills"] <= (80 if is_fp32_on_120 else 64), kernel
        assert kernel["shared"] <= SHARED[arch], kernel
    return kernels


def assert_nothing_is_computed_twice(kernel):
    """Count the products of the compiled code against what its tiles need.

    A tile that its warps compute twice shows in no register and in no result. Some small products
    are on purpose, where registers would not suffice for fewer warps: less than half of the whole.
    """
    if kernel["arch"] == 100:
        return  # the sizes of its products are in descriptors
    multiplications = 0
    for shape, count in kernel["products"].items():
        m, n, k = map(int, re.findall(r"\d+", shape))
        if k == 16:  # those of 8 are of the inverse, in TF32
            multiplications += m * n * k * count
    warps_of_a_product = 4 if kernel["arch"] == 90 else 1
    multiplications *= kernel["options"]["num_warps"] // warps_of_a_product

    tile = kernel["constants"]
    chunk, keys, values = (tile.get(name, 0) for name in ("CHUNK", "BLOCK", "BLOCK_V"))
    is_delta = "delta" in kernel["case"]
    pairs_keys, pairs_values, states = {
        "scores": (1 + is_delta, 0, 0),
        "states": (0, is_delta, 1 + is_delta),
        "outputs": (0, 1, 1),
        "state_gradients": (0, 1 + is_delta, 2 + is_delta),
        "score_gradients": (0, 1 + is_delta, 0),
        "input_gradients": (2 + 2 * is_delta, 0, 2 + is_delta),
    }[kernel["kernel"]]
    needed = chunk * (chunk * (pairs_keys * keys + pairs_values * values) + states * keys * values)
    assert needed <= multiplications < 1.5 * needed, (multiplications / needed, kernel)


def recorded_launches(monkeypatch, family, documents):
    """Return the names of the kernels that forward and backward would launch on a GPU."""
    names = []
    monkeypatch.setattr(
        "triton.runtime.jit.JITFunction.__getitem__",
        lambda kernel, grid: lambda *arguments, **keywords: names.append(kernel.fn.__name__),
    )
    inputs = make(family, 100, heads=2, key_heads=1, dtype=torch.float32)
    arguments = {"decay": None, "beta": None} | inputs
    out, last = backend.forward(**arguments, scale=1.0, documents=documents)
    torch.autograd.grad(out.sum() + last.sum(), list(inputs.values()))
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_launches_do_not_depend_on_the_number_of_documents(monkeypatch, family):
    many = document_ids([[1] * 100, [7, 93]])
    one = recorded_launches(monkeypatch, family, None)
    assert one == recorded_launches(monkeypatch, family, many)
    assert len(one) == {"constant": 9, "scalar": 9}.get(family, 8)


def test_pieces_never_cross_a_documents_edge():
    ids = document_ids([[5, 1, 4], [10]])
    pieces = pieces_of(ids, ids.shape, 4, ids.device)
    assert pieces.table.tolist() == [
        [0, 0, 4, 0, 4],
        [0, 4, 5, 4, -1],
        [0, 5, 6, -1, -1],
        [0, 6, 10, -1, 2],
        [1, 0, 4, 1, 5],
        [1, 4, 8, 5, 6],
        [1, 8, 10, 6, 3],
    ]
    assert pieces.documents.tolist() == [[0, 2], [2, 1], [3, 1], [4, 3]]
    assert pieces.slots == 7


def test_unsupported_calls_are_refused(monkeypatch):
    from longspan.attention import linear_attention

    x = torch.zeros(1, 4, 2, 8)
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="backend triton needs CUDA, but q is on cpu; use torch"
        ):
            linear_attention(x, x, x, backend="triton")
    monkeypatch.setattr(triton_device, "INTERPRETED", True)
    for decay, beta in ((torch.zeros(2), None), (x, None), (None, x[..., 0]), (x, x[..., 0])):
        assert backend.unsupported_reason(x, x, x, decay, beta) is None
    wide_values = torch.zeros(1, 4, 2, 512)
    assert backend.unsupported_reason(x, x, wide_values, None, None) is None
    wide_keys = torch.zeros(1, 4, 2, 257)
    for arguments, reason in [
        ((x.double(), x.double(), x.double(), None, None), "not in torch.float64"),
        ((wide_keys, wide_keys, x, None, None), "key dims up to 256, not 257; use torch"),
    ]:
        assert reason in backend.unsupported_reason(*arguments)


def test_kernels_are_not_specialized_for_lengths():
    from longspan.attention.linear.triton import (
        chunk_scan,
        decay_gradient,
        gradients,
        outputs,
        scores,
        states,
    )

    kernels = [
        chunk_scan.chunk_scan_kernel,
        decay_gradient.decay_gradient_kernel,
        scores.scores_kernel,
        states.states_kernel,
        states.state_gradients_kernel,
        outputs.outputs_kernel,
        gradients.score_gradients_kernel,
        gradients.input_gradients_kernel,
    ]
    for kernel in kernels:
        assert {x.name for x in kernel.params if x.do_not_specialize} == {"length"}


def test_segment_lengths_fill_the_gpu_within_bounds(monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("Chip", (), {"multi_processor_count": 132}),
    )

    def segment(length, programs):
        return scalar._segment(length, programs, torch.device("cuda"))

    assert segment(100, 32) == segment(8192, 32) == 512
    assert segment(1 << 15, 32) == 2048
    assert segment(1 << 20, 32) == segment(1 << 20, 4096) == 4096
