"""Random calls over ranks: strides, NaN places, options and autocast, against one device."""

import random

import numpy as np
import pytest
import torch
from longspan import attention, parallel
from longspan.attention import S2, Causal, Sinks, Window

from .test_operations import LAYOUTS as TOKEN_LAYOUTS
from .test_operations import LENGTH, document_ids, draw

DOCUMENTS = [None, [[5, 8, 13, 1, 20, 5], [26, 13, 13]], [[52], [20, 32]]]


def packed(x):
    """Return ``x`` as one of three that are packed in the last dim: strides of 3."""
    return torch.stack([x, x + 1, x - 1], -1).unbind(-1)[0]


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dims_first(x):
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def one_number(x):
    return x[:1, :1, :1, :1].expand_as(x)


STRIDES = [torch.clone, packed, heads_first, dims_first, one_number]


def softmax(choose):
    pattern = choose([Causal(), S2(4, 2, 3), Window(7), Sinks(3) | Window(5)])
    options = choose([{}, {"softcap": np.float32(3)}, {"scale": torch.tensor(0.25)}])
    schedule = choose(["auto", "ring", "gather", "heads"])
    # Twelve heads split over any layout's ranks.
    shapes = [(LENGTH, 12, 8), (LENGTH, 12, 8), (LENGTH, 12, 6), (LENGTH, 12, 6)]

    def alone(*x, documents):
        return attention.attend(*x, pattern, documents=documents, backend="reference", **options)

    def over_ranks(*x, layout, group, documents):
        return parallel.attend(
            *x, pattern, layout, group, documents=documents, schedule=schedule, **options
        )

    return shapes, alone, over_ranks


def linear(choose):
    schedule = choose(["gather", "scan"])
    decay = choose([None, -torch.rand(3, dtype=torch.float64)])
    options = {"decay": decay, "scale": choose([0.5, np.float64(0.5), torch.tensor([0.5])])}
    has_beta = choose([False, True])
    shapes = [(LENGTH, 3, 4), (LENGTH, 3, 4), (LENGTH, 3, 5), (LENGTH, 3, 5)]

    def beta(v):
        return v[..., 0].sigmoid() if has_beta else None

    def alone(q, k, v, documents):
        k = 0.3 * k
        return attention.linear_attention(
            q, k, v, beta=beta(v), documents=documents, backend="reference", **options
        )

    def over_ranks(q, k, v, layout, group, documents):
        k = 0.3 * k
        return parallel.linear_attention(
            q, k, v, layout, group, beta=beta(v), documents=documents, schedule=schedule, **options
        )

    return shapes, alone, over_ranks


@pytest.mark.parametrize("operation", [softmax, linear])
@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.wide) for seed in range(8, 60))]
)
def test_any_call_is_that_of_one_device(threads, operation, seed):
    choose = random.Random(seed).choice
    torch.manual_seed(seed)
    shapes, alone, over_ranks = operation(choose)
    layout = choose([x for x in TOKEN_LAYOUTS.values() if x.ranks > 1])
    documents = document_ids(choose(DOCUMENTS))
    autocast = choose([False, True])
    strides = [choose(STRIDES) for _ in shapes]
    tensors = draw(seed, *shapes)

    # A NaN at a token of one tensor or of the upstream gradient, in the first row.
    spoiled = choose([None, 0, 1, 2, 3])
    kept = torch.ones(2, LENGTH, dtype=torch.bool)
    if spoiled is not None and strides[spoiled] is not one_number:
        token = choose(range(LENGTH))
        tensors[spoiled][0, token] = torch.nan
        kept[0] = False if documents is None else documents[0] != documents[0, token]

    def gradients(out, leaves, upstream):
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    views = [view(x) for view, x in zip(strides, tensors, strict=True)]
    leaves = [x.clone().requires_grad_() for x in views[:3]]
    expected = gradients(alone(*leaves, documents=documents), leaves, views[3])

    def work(rank, group):
        own = [layout.shard(x, rank) for x in views]
        *leaves, own_upstream = (
            view(x) if x.numel() else x for view, x in zip(strides, own, strict=True)
        )
        leaves = [x.detach().requires_grad_() for x in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = over_ranks(*leaves, layout=layout, group=group, documents=documents)
            return gradients(out, leaves, own_upstream)

    parts = zip(*threads(layout.ranks, work), strict=True)
    for found, exact in zip((layout.unshard(list(x)) for x in parts), expected, strict=True):
        a, b = found[kept], exact[kept]
        assert not a.isnan().any()
        assert (a - b).norm() <= 1e-9 * b.norm().clamp(1)
