"""Every family on every backend that runs here, against the recurrence; states and documents."""

from itertools import pairwise

import pytest
import torch
from longspan.attention import linear_attention
from longspan.attention.linear.attention import state_map

from .recurrence import FAMILIES, document_ids, errors, make, recurrence

# Edges inside chunks of 64, on them, and several in one; another for each row.
DOCUMENTS = {
    "one": None,
    "edges": [[17, 1, 46, 50, 1, 15], [3, 123, 4]],
    "chunks": [[64, 64, 2], [128, 2]],
}
WIDE = pytest.mark.wide
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def run(**arguments):
    return linear_attention(**arguments, return_state=True)


def on(backend):
    return lambda **arguments: run(**arguments, backend=backend)


@pytest.mark.parametrize(
    ("documents", "dtype"),
    [
        ("one", torch.float64),
        ("edges", torch.float64),
        ("edges", torch.float32),
        *(
            pytest.param(name, dtype, marks=WIDE)
            for name, dtype in (("chunks", torch.float64), ("one", torch.float32))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_the_recurrence(family, documents, dtype):
    found = errors(
        on("torch"),
        make(family, dtype=dtype),
        scale=0.7,
        documents=document_ids(DOCUMENTS[documents]),
    )
    assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_recurrence(family):
    found = errors(
        on("reference"), make(family, 70), scale=0.7, documents=document_ids([[17, 1, 52], [64, 6]])
    )
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("length", [1, 65, *(pytest.param(n, marks=WIDE) for n in (2, 63, 64))])
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_lengths(family, length):
    found = errors(on("torch"), make(family, length, heads=2, key_heads=1))
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strength", [pytest.param(5.0, marks=WIDE), 150.0])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("none", "delta")])
def test_strong_decays(family, strength, dtype):
    """The sums over a chunk reach -300 and -9000, whose inverse exponentials are infinite."""
    found = errors(on("torch"), make(family, 130, strength=strength, dtype=dtype))
    assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.parametrize(
    "documents",
    [DOCUMENTS["edges"], *(pytest.param(DOCUMENTS[n], marks=WIDE) for n in ("one", "chunks"))],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_hand_their_state_on(family, documents, monkeypatch):
    monkeypatch.setattr("longspan.attention.linear.torch._SEGMENT", 64)
    found = errors(on("torch"), make(family), documents=document_ids(documents))
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_of_several_chunks(family, monkeypatch):
    monkeypatch.setattr("longspan.attention.linear.torch._SEGMENT", 128)
    documents = document_ids([[17, 100, 150, 33], [128, 64, 108]])
    found = errors(on("torch"), make(family, 300), scale=0.7, documents=documents)
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_input_alone_may_want_a_gradient(family):
    given = make(family)
    out, _ = run(**given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    expected = torch.autograd.grad(out, list(given.values()), upstream)
    for name, gradient in zip(given, expected, strict=True):
        one = {other: x.detach().requires_grad_(other == name) for other, x in given.items()}
        (found,) = torch.autograd.grad(run(**one)[0], [one[name]], upstream)
        assert torch.equal(found, gradient), name


@pytest.mark.parametrize("strongest", [-1e4, -1e30, -torch.inf])
@pytest.mark.parametrize(
    "family", ["constant", "scalar", "vector", "gated delta", "gated delta by key"]
)
def test_decays_that_leave_nothing(family, strongest):
    """They hide what was before, and no digit of the others."""
    given = make(family)
    decay = given["decay"].detach().clone()
    decay.view(-1)[1::7] = strongest
    given["decay"] = decay.requires_grad_()
    for dtype, tolerance in TOLERANCE.items():
        cast = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
        found = errors(on("torch"), cast)
        assert max(found.values()) < tolerance, (dtype, found)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [{"length": 0}, {"batch": 0}, {"length": 0, "batch": 0}], ids=str)
def test_nothing_to_do(family, shape, backend):
    given = make(family, **shape)
    out, state = run(**given, backend=backend)
    assert out.shape == given["v"].shape
    assert torch.equal(state, given["state"])
    gradients = torch.autograd.grad(
        out.sum() + state.sum(), list(given.values()), allow_unused=True
    )
    assert torch.equal(gradients[list(given).index("state")], torch.ones_like(state))


@pytest.mark.parametrize(
    "shape",
    [{"heads": 1, "key_heads": 1}, {"heads": 6, "key_heads": 2}, {"dim": 5, "value_dim": 16}],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_dims(family, shape):
    found = errors(on("torch"), make(family, 70, **shape))
    assert max(found.values()) < 1e-10, found


def pieces(given, cuts):
    """The arguments of each part of the time."""
    edges = [0, *cuts, given["q"].shape[1]]
    for start, stop in pairwise(edges):
        yield (
            (start, stop),
            {n: x if n == "state" or x.ndim == 1 else x[:, start:stop] for n, x in given.items()},
        )


@pytest.mark.parametrize(
    "cuts",
    [[64], [7, 63, 90, 129], *(pytest.param(cuts, marks=WIDE) for cuts in ([1], [100, 101]))],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_handed_on_changes_nothing(family, cuts):
    documents = document_ids([[70, 50, 10], [30, 100]])

    def in_parts(**given):
        state, outs = given["state"], []
        for (start, stop), own in pieces(given, cuts):
            if (
                start
            ):  # a state belongs to the document that goes on; the caller drops it at an edge
                state = (
                    state * (documents[:, start] == documents[:, start - 1])[:, None, None, None]
                )
            out, state = run(**own | {"state": state}, documents=documents[:, start:stop])
            outs.append(out)
        return torch.cat(outs, 1), state

    given = make(family)
    expected, last = recurrence(**given, documents=documents)
    ours = in_parts(**given)
    assert (
        max(
            float((a - b).detach().norm() / b.detach().norm())
            for a, b in zip(ours, (expected, last), strict=True)
        )
        < 1e-10
    )
    loss = [out.square().sum() + state.square().sum() for out, state in (ours, (expected, last))]
    for a, b in zip(*(torch.autograd.grad(x, list(given.values())) for x in loss), strict=True):
        assert (a - b).norm() < 1e-10 * b.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_single_tokens_are_steps(family):
    """Decoding: token by token, as a whole sequence."""
    given = {name: x.detach() for name, x in make(family, 70, dtype=torch.float32).items()}
    whole, last = run(**given)
    state, outs = given["state"], []
    for _, own in pieces(given, range(1, 70)):
        out, state = run(**own | {"state": state})
        outs.append(out)
    assert (torch.cat(outs, 1) - whole).norm() < 1e-5 * whole.norm()
    assert (state - last).norm() < 1e-5 * last.norm()


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_map_a_state_to_a_state(family, documents):
    given = make(family)
    documents = document_ids(documents)
    kept, added = state_map(
        given["k"], given["v"], given.get("decay"), given.get("beta"), documents
    )
    last = recurrence(**given, documents=documents)[1]
    mapped = (kept @ given["state"] if "beta" in given else kept * given["state"]) + added
    assert (mapped - last).norm() < 1e-10 * last.norm()


MUTATIONS = {
    "decayed once more": lambda given: given | {"state": given["state"] * 0.98},
    "beta of the neighbour": lambda given: given | {"beta": given["beta"].roll(1, 1)},
    "a decay late": lambda given: given | {"decay": given["decay"].roll(1, 1)},
    "keys swapped": lambda given: given | {"k": given["k"].flip(2)},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation):
    found = errors(lambda **given: run(**MUTATIONS[mutation](given)), make("gated delta by key"))
    assert max(found.values()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_accumulates_in_fp32(family):
    given = {name: x.detach() for name, x in make(family, dtype=torch.float32).items()}
    low = {name: x if name in ("decay", "state") else x.bfloat16() for name, x in given.items()}
    exact = recurrence(**{name: x.double() for name, x in low.items()})
    out, state = run(**low)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (out - exact[0]).norm() / exact[0].norm() < 5e-3
    assert (state - exact[1]).norm() / exact[1].norm() < 1e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients(family, backend):
    """Of all inputs, with documents and a scale that bf16 cannot hold."""
    options = {"scale": 24**-0.5, "documents": document_ids(DOCUMENTS["edges"])}
    given = make(family, dtype=torch.float32)
    low = {
        n: x.detach().to(x.dtype if n in ("decay", "state") else torch.bfloat16).requires_grad_()
        for n, x in given.items()
    }
    wide = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    (out, state), (exact, last) = (
        run(**low, **options, backend=backend),
        recurrence(**wide, **options),
    )
    assert (out - exact).norm() / exact.norm() < 5e-3
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = torch.autograd.grad((out, state), list(low.values()), (upstream, torch.ones_like(state)))
    theirs = torch.autograd.grad(
        (exact, last), list(wide.values()), (upstream.double(), torch.ones_like(last))
    )
    for name, a, b in zip(given, ours, theirs, strict=True):
        assert (a - b).norm() / b.norm() < 5e-3, name


def test_memory_is_that_of_a_segment():
    """Between forward and backward only inputs and states are kept, no results of chunks."""
    given = make("gated delta by key", 1024, heads=2, key_heads=2, batch=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        run(**given)
    assert sum(kept) < 3 * sum(x.numel() for x in given.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decay": torch.zeros(2)},
            r"decay must have shape \(3,\), \(1, 6, 3\) or \(1, 6, 3, 4\), got \(2,\)",
        ),
        ({"decay": torch.zeros(3, dtype=torch.bfloat16)}, "decay must be float32"),
        ({"beta": torch.zeros(1, 6, 3, 4)}, r"beta must have shape \(1, 6, 3\)"),
        ({"state": torch.zeros(1, 3, 4, 5)}, r"state must have shape \(1, 3, 4, 4\)"),
        ({"k": torch.zeros(1, 6, 2, 4)}, "shapes do not fit"),
        (
            {"v": torch.zeros(1, 6, 4, 4)},
            "v has 4 heads, which must be a multiple of the 3 of q and k",
        ),
        (
            {"documents": torch.zeros(1, 5).int()},
            r"documents must be integers of shape \(1, 6\), got int32 of shape \(1, 5\)",
        ),
        ({"documents": torch.tensor([[0, 0, 1, 0, 0, 0]])}, "must not decrease"),
        ({"backend": "flash"}, "backend must be auto, torch, triton, fla or reference"),
        ({"backend": "triton"}, "backend triton needs CUDA, but q is on cpu; use torch"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {name: torch.zeros(1, 6, 3, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments | change)
