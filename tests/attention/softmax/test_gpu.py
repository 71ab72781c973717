"""The Triton kernels on a GPU (`make test-gpu`), against the dense formula in fp64."""

import pytest
import torch
from longspan.attention import (
    S2,
    BlockLists,
    Causal,
    Dilated,
    MoBA,
    PerHead,
    Sinks,
    Stripes,
    Window,
    attend,
)

from .oracle import document_ids, errors, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LISTS = BlockLists.where(64, lambda i, j, h: (i * 7 + j * 3 + h) % 5 < 2, 1024, num_kv_heads=2)
PATTERNS = [
    Causal(),
    Window(200),
    S2(64, 2, 3),
    S2(128, 1, 4, near=(3, 2)) | Sinks(70),
    Stripes(64, 3, 1),
    Dilated(64, 2, 3) | Window(100),
    PerHead([Causal(), S2(64, 1, 3) | Sinks(3)]),
    LISTS,
]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_parity(pattern, dim, dtype):
    inputs = [x.detach().cuda().to(dtype).requires_grad_() for x in make(2, 1000, 6, 2, dim)]
    error_by_name = errors(
        lambda: attend(*inputs, pattern, backend="triton", return_lse=True), inputs, pattern=pattern
    )
    assert max(error_by_name.values()) < TOLERANCE[dtype], error_by_name


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"sigmoid_bias": -4.0}, {"documents": [300, 64, 500]}], ids=str
)
def test_options(options):
    ids = document_ids(options.pop("documents", None))
    ids = None if ids is None else ids.cuda()
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in make(2, 864, 4, 2, 64)]

    def run():
        out = attend(
            *inputs,
            S2(64, 2, 3),
            backend="triton",
            documents=ids,
            return_lse="sigmoid_bias" not in options,
            **options,
        )
        return (out, None) if "sigmoid_bias" in options else out

    error_by_name = errors(run, inputs, pattern=S2(64, 2, 3), documents=ids, **options)
    assert max(error_by_name.values()) < 1e-2, error_by_name


def test_moba_agrees_with_the_torch_backend():
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in make(2, 1024, 4, 2, 64)]
    outs = [attend(*inputs, MoBA(64, 4), backend=backend) for backend in ("triton", "torch")]
    assert (outs[0] - outs[1]).float().norm() / outs[1].float().norm() < 1e-2


def test_reruns_are_bitwise_equal():
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in make(1, 9000, 4, 2, 64)]
    runs = []
    for _ in range(2):
        out = attend(*inputs, S2(64, 4, 8), backend="triton")
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_another_length_does_not_recompile():
    from longspan.attention.softmax.triton.dkv import dkv_kernel
    from longspan.attention.softmax.triton.forward_dq import forward_dq_kernel

    def run(length):
        x = torch.randn(1, length, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        attend(x, x, x, S2(64, 2, 3), backend="triton").sum().backward()
        return [len(kernel.device_caches[0][0]) for kernel in (forward_dq_kernel, dkv_kernel)]

    assert run(640) == run(1111) == run(2048)
