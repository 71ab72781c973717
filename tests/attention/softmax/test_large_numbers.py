"""Patterns whose numbers are larger than any document: exact, and no dearer than the document."""

from math import prod

import pytest
import torch
from longspan.attention import (
    S2,
    Causal,
    Dilated,
    PerHead,
    Sinks,
    Stripes,
    Window,
    attend,
)
from longspan.parallel import Layout
from longspan.parallel.schedules.choose import make_plan
from longspan.parallel.schedules.names import schedules_named
from longspan.parallel.schedules.plan import batch_rows
from torch.utils._python_dispatch import TorchDispatchMode

LARGE = (2**15, 2**40, 2**80)
TOKENS, DOCUMENTS, HEADS, DIM = 512, 8, 2, 8


def patterns(n):
    """Patterns with a number ``n``, and what they are in a document of fewer tokens."""
    return {
        "sinks": (Sinks(n), Causal()),
        "window": (Window(n), Causal()),
        "sinks and window": (Sinks(n) | Window(3), Causal()),
        "stripes": (Stripes(8, n), None),
        "stripes elsewhere": (Stripes(8, n, offset=1, head_step=1), None),
        "local blocks": (S2(8, n, 4), Causal()),
        "stride": (S2(8, 2, n), S2(8, 2, 2**10)),
        "offset": (S2(8, 2, 4, offset=4 * n), S2(8, 2, 4)),
        "near": (S2(8, 2, 4, near=(n, 2)), S2(8, 2, 4, near=(2**10, 2))),
        "dilation": (Dilated(8, n, 3), Dilated(8, 2**10, 3)),
        "count": (Dilated(8, 2, n), Dilated(8, 2, 2**10)),
        "of heads": (PerHead([Window(n), Sinks(n)]), Causal()),
    }


def tensors(tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, HEADS, DIM)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]


def documents():
    return torch.arange(DOCUMENTS).repeat_interleave(TOKENS // DOCUMENTS)[None]


@pytest.mark.parametrize("name", patterns(1 << 15))
@pytest.mark.parametrize("n", LARGE)
def test_they_are_exact(name, n):
    pattern, _ = patterns(n)[name]
    q, k, v = tensors()
    out = attend(q, k, v, pattern, documents=documents(), backend="torch")
    expected = attend(q, k, v, pattern, documents=documents(), backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = (torch.autograd.grad(x, (q, k, v), upstream) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", patterns(1 << 15))
@pytest.mark.parametrize("n", LARGE)
def test_they_are_what_they_are_in_a_document(name, n):
    pattern, same = patterns(n)[name]
    positions = torch.arange(100)
    if same is not None:
        mask = pattern.mask(positions, positions, HEADS)
        assert mask.equal(same.mask(positions, positions, HEADS))
        assert pattern.density(100, HEADS) == same.density(100, HEADS)
    assert [pattern.need(64, 100, head) for head in range(HEADS)]
    assert pattern.covers(HEADS) in (True, False)


class CountNumbers(TorchDispatchMode):
    """Counts the numbers in all results of all operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.count += prod(result.shape)
        return result


def numbers_made(pattern):
    with CountNumbers() as counter:
        q, k, v = tensors()
        attend(q, k, v, pattern, documents=documents(), backend="torch").sum().backward()
    return counter.count


@pytest.mark.parametrize("name", ["sinks", "window", "sinks and window", "local blocks"])
@pytest.mark.parametrize("n", LARGE)
def test_their_cost_follows_the_document(name, n):
    pattern, same = patterns(n)[name]
    # First tokens and a band are two pieces with masks, where a causal document is one without.
    # Padding each document to the first tokens would make 100 times as many.
    assert numbers_made(pattern) <= 4 * numbers_made(same)


@pytest.mark.parametrize("name", patterns(1 << 15))
@pytest.mark.parametrize("n", [2**40, 2**80])
@pytest.mark.parametrize("schedule", ["ring", "gather", "stripes", "heads"])
def test_ranks_plan_them(name, n, schedule):
    pattern, _ = patterns(n)[name]
    layout = Layout.zigzag(TOKENS, 2, 8)
    (chosen, *_) = schedules_named(schedule, 2)
    rows = batch_rows(documents(), 1, TOKENS)
    for rank in range(2):
        plan = make_plan(layout, pattern, HEADS, HEADS, rows, chosen, rank)
        assert plan.stages
        columns = [stage.exchange.num_columns for stage in plan.stages if stage.exchange]
        assert sum(columns) <= 4 * TOKENS


def test_a_covering_is_found_without_its_period():
    halves = Stripes(64, 2, head_step=0) | Stripes(64, 2, 1, head_step=0)
    assert halves.covers(1)
    assert (halves | Stripes(64, 2**40)).covers(1)
    thirds = Stripes(8, 3, head_step=0) | Stripes(8, 3, 1, head_step=0)
    assert not (thirds | Stripes(8, 5**20)).covers(1)
    assert (thirds | Stripes(8, 3, 2, head_step=0)).covers(1)
    mixed = (
        Stripes(8, 2, head_step=0) | Stripes(16, 2, head_step=0) | Stripes(16, 2, 1, head_step=0)
    )
    assert mixed.covers(1)
