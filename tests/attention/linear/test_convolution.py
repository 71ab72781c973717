from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from longspan.attention import short_convolution

from .recurrence import document_ids


def make(length=30, channels=6, width=4):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, channels), (channels, width), (channels,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def by_document(x, weight, bias, documents):
    """Apply torch's convolution to each document by itself."""
    outs = torch.zeros_like(x)
    for row, ids in enumerate(documents):
        for document in ids.unique():
            tokens = ids == document
            padded = F.pad(x[row, tokens].T, (weight.shape[1] - 1, 0))
            outs[row, tokens] = F.conv1d(padded[None], weight[:, None], bias, groups=x.shape[2])[
                0
            ].T
    return outs


@pytest.mark.parametrize(
    "documents", [[[30], [30]], [[1, 2, 3, 24], [10, 1, 1, 1, 17]]], ids=["one", "packed"]
)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_each_document_is_convolved_alone(documents, width):
    inputs = make(width=width)
    documents = document_ids(documents)
    upstream = torch.randn(2, 30, 6, dtype=torch.float64)
    our_out = short_convolution(*inputs, documents=documents)
    expected_out = by_document(*inputs, documents)
    our_grads = torch.autograd.grad(our_out, inputs, upstream)
    expected_grads = torch.autograd.grad(expected_out, inputs, upstream)
    for ours, expected in zip((our_out, *our_grads), (expected_out, *expected_grads), strict=True):
        assert (ours - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("cuts", [[1], [3, 4], [10, 12, 20], list(range(1, 30))], ids=str)
@pytest.mark.parametrize(
    "documents", [[[30], [30]], [[1, 2, 3, 24], [10, 1, 1, 1, 17]]], ids=["one", "packed"]
)
def test_segments_with_carried_state_equal_the_whole(cuts, documents):
    x, weight, bias = make()
    documents = document_ids(documents)
    outs = []
    state = None
    for start, stop in pairwise([0, *cuts, 30]):
        ids = documents[:, start:stop]
        if start:  # the caller drops the state where a document begins
            state = state * (documents[:, start] == documents[:, start - 1])[:, None, None]
        out, state = short_convolution(
            x[:, start:stop], weight, bias, state=state, documents=ids, return_state=True
        )
        outs.append(out)
    assert torch.allclose(torch.cat(outs, 1), by_document(x, weight, bias, documents), rtol=1e-12)


def test_bf16_accumulates_in_fp32():
    x, weight, _ = (t.detach() for t in make(width=4))
    low = short_convolution(x.bfloat16(), weight.bfloat16())
    exact = short_convolution(x.bfloat16().double(), weight.bfloat16().double())
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"weight \[channels, width\], got \(1, 3, 6\), \(5, 4\)"),
        ({"state": torch.zeros(1, 4, 6)}, r"state must be \(1, 3, 6\)"),
        ({"documents": torch.zeros(1, 4).int()}, "documents must be integers"),
    ],
)
def test_errors_name_the_invalid_argument(change, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(**{"x": torch.zeros(1, 3, 6), "weight": torch.zeros(6, 4)} | change)
