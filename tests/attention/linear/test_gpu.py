"""Linear attention's Triton kernels on a GPU, against the recurrence in fp64: `make test-gpu`."""

import pytest
import torch
from longspan.attention import linear_attention

from .recurrence import FAMILIES, document_ids, errors, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}
LENGTH = 300  # three segments, the last of them short; longer ones make the recurrence slow
DOCUMENTS = [
    [17, 1, 110, 64, 1, 107],
    [3, 125, 172],
]  # they begin inside segments and at their edges


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr("longspan.attention.linear.triton.scalar._SHORTEST", 128)


def run(**arguments):
    """Run on the GPU with arguments from the CPU, where the recurrence runs."""
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return linear_attention(**on_gpu, return_state=True, backend="triton")


def arguments(family, dim, dtype, value_dim=None, **options):
    """Return arguments in ``dtype``, except those that stay in fp32."""
    inputs = make(
        family,
        LENGTH,
        heads=2,
        key_heads=1,
        dim=dim,
        value_dim=value_dim or dim,
        dtype=torch.float32,
        **options,
    )
    in_fp32 = ("decay", "state")
    return {
        name: x if name in in_fp32 else x.detach().to(dtype).requires_grad_()
        for name, x in inputs.items()
    }


def check(inputs, **options):
    error_by_name = errors(run, inputs, **options)
    tolerance = TOLERANCE[inputs["q"].dtype]
    # The gradient of the decay is a small difference of large sums.
    assert error_by_name.pop("decay", 0.0) < 3 * tolerance, error_by_name
    assert max(error_by_name.values()) < tolerance, error_by_name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family, dim, dtype):
    check(arguments(family, dim, dtype), scale=0.7)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents(family):
    check(arguments(family, 64, torch.bfloat16), documents=document_ids(DOCUMENTS))


@pytest.mark.parametrize("strength", [5.0, 1000.0])
@pytest.mark.parametrize("family", [x for x in FAMILIES if x not in ("none", "delta")])
def test_strong_decays(family, strength):
    check(arguments(family, 64, torch.bfloat16, strength=strength))


@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [(16, 128), (128, 16), (96, 96), (36, 100), (153, 64), (256, 256), (64, 512)],
)
@pytest.mark.parametrize("family", ["scalar", "vector", "gated delta", "gated delta by key"])
def test_odd_dims(family, dim, value_dim):
    check(arguments(family, dim, torch.bfloat16, value_dim))


def on_the_gpu(family, length):
    inputs = make(family, length, heads=4, key_heads=2, dim=64, value_dim=64, dtype=torch.float32)
    return {name: x.detach().cuda().requires_grad_() for name, x in inputs.items()}


def results(inputs):
    """Return the output, the last state and the gradients."""
    low = {name: x if name in ("decay", "state") else x.bfloat16() for name, x in inputs.items()}
    out, last = linear_attention(**low, return_state=True, backend="triton")
    return [
        out,
        last,
        *torch.autograd.grad(out.float().square().sum() + last.sum(), list(inputs.values())),
    ]


@pytest.mark.parametrize("family", ["scalar", "gated delta", "gated delta by key"])
def test_reruns_are_bitwise_equal(family):
    inputs = on_the_gpu(family, 9000)
    again = results(inputs)
    assert all(torch.equal(a, b) for a, b in zip(results(inputs), again, strict=True))


@pytest.mark.parametrize("family", ["scalar", "gated delta", "gated delta by key"])
def test_another_length_does_not_recompile(family):
    from longspan.attention.linear.triton import chunk_scan, gradients, outputs, scores, states

    kernels = (
        chunk_scan.chunk_scan_kernel,
        chunk_scan.state_passing_kernel,
        scores.scores_kernel,
        states.states_kernel,
        states.state_gradients_kernel,
        outputs.outputs_kernel,
        gradients.input_gradients_kernel,
    )

    def compiled_variants(length):
        results(on_the_gpu(family, length))
        return [len(kernel.device_caches[0][0]) for kernel in kernels]

    assert compiled_variants(640) == compiled_variants(1111) == compiled_variants(2048)
