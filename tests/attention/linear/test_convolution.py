from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from longspan.attention import short_convolution

from .recurrence import document_ids


def make(length=30, channels=6, width=4):
    generator = torch.Generator().manual_seed(length)
    shapes = (2, length, channels), (channels, width), (channels,)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def by_document(x, weight, bias, documents):
    """What torch's convolution makes of each document by itself."""
    outs = torch.zeros_like(x)
    for row, ids in enumerate(documents):
        for document in ids.unique():
            own = ids == document
            padded = F.pad(x[row, own].T, (weight.shape[1] - 1, 0))
            outs[row, own] = F.conv1d(padded[None], weight[:, None], bias, groups=x.shape[2])[0].T
    return outs


@pytest.mark.parametrize(
    "documents", [[[30], [30]], [[1, 2, 3, 24], [10, 1, 1, 1, 17]]], ids=["one", "packed"]
)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_a_convolution_of_each_document(documents, width):
    inputs, documents = make(width=width), document_ids(documents)
    upstream = torch.randn(2, 30, 6, dtype=torch.float64)
    pairs = [
        (out, *torch.autograd.grad(out, inputs, upstream))
        for out in (
            short_convolution(*inputs, documents=documents),
            by_document(*inputs, documents),
        )
    ]
    for ours, expected in zip(*pairs, strict=True):
        assert (ours - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("cuts", [[1], [3, 4], [10, 12, 20], list(range(1, 30))], ids=str)
@pytest.mark.parametrize(
    "documents", [[[30], [30]], [[1, 2, 3, 24], [10, 1, 1, 1, 17]]], ids=["one", "packed"]
)
def test_parts_with_their_state_are_the_whole(cuts, documents):
    x, weight, bias = make()
    documents, outs, state = document_ids(documents), [], None
    edges = [0, *cuts, 30]
    for start, stop in pairwise(edges):
        ids = documents[:, start:stop]
        if start:
            state = state * (documents[:, start] == documents[:, start - 1])[:, None, None]
        out, state = short_convolution(
            x[:, start:stop], weight, bias, state=state, documents=ids, return_state=True
        )
        outs.append(out)
    assert torch.allclose(torch.cat(outs, 1), by_document(x, weight, bias, documents), rtol=1e-12)


def test_bf16_is_added_up_in_fp32():
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
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(**{"x": torch.zeros(1, 3, 6), "weight": torch.zeros(6, 4)} | change)
