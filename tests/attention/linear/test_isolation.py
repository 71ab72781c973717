"""A NaN in one document leaves the others as they are, forward and backward."""

import pytest
import torch
from longspan.attention import linear_attention, short_convolution

from .recurrence import FAMILIES, document_ids, make

DOCUMENTS = document_ids([[20, 50, 60], [64, 6, 60]])  # edges inside chunks and on them
SPOILED = slice(20, 70)  # of the first row
TOKEN = 40


def run(given, upstream, upstream_state, backend):
    """Return outputs and gradients by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    out, last = linear_attention(**leaves, documents=DOCUMENTS, return_state=True, backend=backend)
    gradients = torch.autograd.grad((out, last), list(leaves.values()), (upstream, upstream_state))
    return {"out": out, "last": last} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_attention(family, value):
    given = {name: x.detach() for name, x in make(family).items()}
    upstream = torch.randn(2, 130, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    upstream_state = torch.ones_like(given["state"])
    clean = run(given, upstream, upstream_state, "torch")
    per_token = [name for name, x in given.items() if x.shape[1:2] == (130,)]
    others = torch.ones(2, 130, dtype=torch.bool)
    others[0, SPOILED] = False

    for spoiled in [*per_token, "upstream"]:
        spoiled_given = {name: x.clone() for name, x in given.items()}
        spoiled_upstream = upstream.clone()
        target = spoiled_upstream if spoiled == "upstream" else spoiled_given[spoiled]
        target[0, TOKEN, 1] = value
        found = run(spoiled_given, spoiled_upstream, upstream_state, "torch")
        expected = run(spoiled_given, spoiled_upstream, upstream_state, "reference")
        for name, x in found.items():
            # Nothing hides what the recurrence shows as NaN.
            assert not (expected[name].isnan() & ~x.isnan()).any(), (spoiled, name)
            if name in ("out", *per_token):
                same = torch.allclose(x[others], clean[name][others], rtol=1e-12, atol=0)
                assert same or (x[others] - clean[name][others]).norm() < 1e-12, (spoiled, name)
        assert torch.equal(found["last"], clean["last"])  # of the last documents
        assert torch.equal(found["state"], clean["state"])  # of the first ones


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states(family, backend):
    """A NaN in the first state stays in the first document, one upstream of the last there."""
    given = {name: x.detach() for name, x in make(family).items()}
    upstream = torch.ones(2, 130, 4, 5).double()
    upstream_state = torch.ones_like(given["state"])
    upstream_state[0, 1, 2] = torch.nan
    given["state"][0, 2, 3] = torch.nan
    found = run(given, upstream, upstream_state, backend)
    assert found["out"][0, :20, 2].isnan().all(-1).all()
    assert found["out"][0, :, :2].isfinite().all()
    for name in ("out", "q", "k", "v"):
        assert found[name][0, SPOILED].isfinite().all(), name
        assert found[name][1].isfinite().all(), name
    assert found["v"][0, 70:, 1].isnan().any()
    assert found["last"].isfinite().all()


def test_a_decay_of_minus_infinity_is_none_of_these():
    given = {name: x.detach() for name, x in make("scalar").items()}
    given["decay"][0, TOKEN, 1] = -torch.inf
    exact = linear_attention(**given, documents=DOCUMENTS, backend="reference")
    found = linear_attention(**given, documents=DOCUMENTS)
    assert (found - exact).norm() < 1e-10 * exact.norm()


def test_short_convolution():
    """NaN reaches the three tokens that follow in its document, or before it in backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 130, 6, generator=generator).double()
    upstream = torch.randn(2, 130, 6, generator=generator).double()
    weight = torch.randn(6, 4, generator=generator).double()

    def tokens(spoil_x, spoil_upstream):
        own = x.clone()
        own[0, spoil_x] = torch.nan
        own.requires_grad_()
        gradient = upstream.clone()
        gradient[0, spoil_upstream] = torch.nan
        out, state = short_convolution(own, weight, documents=DOCUMENTS, return_state=True)
        (dx,) = torch.autograd.grad((out, state), own, (gradient, torch.ones_like(state)))
        assert not state.isnan().any()
        return [y.isnan().any(-1).nonzero().tolist() for y in (out, dx)]

    none: list[int] = []
    assert tokens([68], none) == [[[0, 68], [0, 69]], []]
    assert tokens([40], none) == [[[0, 40], [0, 41], [0, 42], [0, 43]], []]
    assert tokens(none, [21]) == [[], [[0, 20], [0, 21]]]
