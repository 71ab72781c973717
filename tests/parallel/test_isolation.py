"""A NaN in one document leaves the others as they are, forward and backward, over ranks."""

import pytest
import torch
from longspan import parallel
from longspan.attention import S2
from longspan.parallel import Layout

LENGTH = 52
LAYOUTS = {
    "contiguous": Layout.contiguous(LENGTH, 3),
    "zigzag": Layout.zigzag(LENGTH, 4, 4),
    "uneven": Layout((((0, 1), (40, 52)), (), ((1, 30),), ((30, 33), (33, 40)))),
}
# The second document begins and ends inside of segments, and has segments of its own.
DOCUMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor([10, 31, 11]))[None].int()
SPOILED = slice(10, 41)
TOKEN = 25


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(1, LENGTH, *shape, generator=generator, dtype=torch.float64)


def linear(schedule, delta):
    inputs = {"q": draw(2, 4), "k": 0.5 * draw(2, 4), "v": draw(2, 5), "decay": -draw(2).abs()}
    if delta:
        inputs["beta"] = draw(2, 1)[..., 0].sigmoid()

    def run(own, layout, group):
        return parallel.linear_attention(
            *(own.pop(name) for name in "qkv"),
            layout, group, documents=DOCUMENTS, schedule=schedule, **own,
        )  # fmt: skip

    return inputs, run, (2, 5)


def convolution():
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)

    def run(own, layout, group):
        return parallel.short_convolution(
            own["x"], weight, None, layout, group, documents=DOCUMENTS
        )

    return {"x": draw(3)}, run, (3,)


def softmax(schedule):
    def run(own, layout, group):
        return parallel.attend(
            *own.values(), S2(4, 2, 3), layout, group, documents=DOCUMENTS, schedule=schedule
        )

    return {"q": draw(4, 8), "k": draw(2, 8), "v": draw(2, 6)}, run, (4, 6)


CASES = {
    "linear, gather": linear("gather", delta=False),
    "linear, scan": linear("scan", delta=False),
    "delta, gather": linear("gather", delta=True),
    "delta, scan": linear("scan", delta=True),
    "convolution": convolution(),
    "ring": softmax("ring"),
    "gather": softmax("gather"),
    "stripes": softmax("stripes"),
}


def over_ranks(threads, layout, run, inputs, upstream):
    """Return the output and the gradients of all inputs, put together again."""

    def work(rank, group):
        own = {name: layout.shard(x, rank).requires_grad_() for name, x in inputs.items()}
        out = run(dict(own), layout, group)
        gradients = torch.autograd.grad(out, list(own.values()), layout.shard(upstream, rank))
        return out.detach(), *gradients

    return [layout.unshard(list(parts)) for parts in zip(*threads(layout.ranks, work), strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_nan_stays_in_its_document(threads, name, layout):
    inputs, run, out_shape = CASES[name]
    others = torch.ones(LENGTH, dtype=torch.bool)
    others[SPOILED] = False
    upstream = draw(*out_shape)
    expected = over_ranks(threads, layout, run, inputs, upstream)

    for spoiled in [*inputs, "upstream"]:
        given = {name: x.clone() for name, x in (inputs | {"upstream": upstream}).items()}
        given[spoiled][:, TOKEN] = torch.nan
        found = over_ranks(threads, layout, run, given, given.pop("upstream"))
        assert any(x.isnan().any() for x in found), spoiled
        for result, (a, b) in zip(["out", *inputs], zip(found, expected, strict=True), strict=True):
            assert torch.allclose(a[:, others], b[:, others], rtol=1e-12), (spoiled, result)
