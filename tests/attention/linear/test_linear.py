"""Every family on every backend that runs here, against the recurrence; states and documents."""

from itertools import pairwise

import pytest
import torch
from longspan.attention import linear_attention
from longspan.attention.linear.attention import state_map

from .recurrence import FAMILIES, document_ids, errors, make, recurrence

# Documents that begin inside chunks of 64, on their edges, and several in one chunk; the rows
# differ.
DOCUMENTS = {
    "one": None,
    "edges": [[17, 1, 46, 50, 1, 15], [3, 123, 4]],
    "chunks": [[64, 64, 2], [128, 2]],
}
WIDE = pytest.mark.wide
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def run(**arguments):
    return linear_attention(**arguments, return_state=True)


def with_backend(backend):
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
def test_chunks_match_the_recurrence(family, documents, dtype):
    error_by_name = errors(
        with_backend("torch"),
        make(family, dtype=dtype),
        scale=0.7,
        documents=document_ids(DOCUMENTS[documents]),
    )
    assert max(error_by_name.values()) < TOLERANCE[dtype], error_by_name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_matches_the_recurrence(family):
    error_by_name = errors(
        with_backend("reference"),
        make(family, 70),
        scale=0.7,
        documents=document_ids([[17, 1, 52], [64, 6]]),
    )
    assert max(error_by_name.values()) < 1e-12, error_by_name


@pytest.mark.parametrize("length", [1, 65, *(pytest.param(n, marks=WIDE) for n in (2, 63, 64))])
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_lengths(family, length):
    error_by_name = errors(with_backend("torch"), make(family, length, heads=2, key_heads=1))
    assert max(error_by_name.values()) < 1e-10, error_by_name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strength", [pytest.param(5.0, marks=WIDE), 150.0])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("none", "delta")])
def test_strong_decays(family, strength, dtype):
    """The sums over a chunk reach -300 and -9000, whose inverse exponentials are infinite."""
    error_by_name = errors(with_backend("torch"), make(family, 130, strength=strength, dtype=dtype))
    assert max(error_by_name.values()) < TOLERANCE[dtype], error_by_name


@pytest.mark.parametrize(
    "documents",
    [DOCUMENTS["edges"], *(pytest.param(DOCUMENTS[n], marks=WIDE) for n in ("one", "chunks"))],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_pass_their_state_on(family, documents, monkeypatch):
    monkeypatch.setattr("longspan.attention.linear.torch._SEGMENT", 64)
    error_by_name = errors(with_backend("torch"), make(family), documents=document_ids(documents))
    assert max(error_by_name.values()) < 1e-10, error_by_name


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_of_several_chunks(family, monkeypatch):
    monkeypatch.setattr("longspan.attention.linear.torch._SEGMENT", 128)
    documents = document_ids([[17, 100, 150, 33], [128, 64, 108]])
    error_by_name = errors(with_backend("torch"), make(family, 300), scale=0.7, documents=documents)
    assert max(error_by_name.values()) < 1e-10, error_by_name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_single_input_are_the_same(family):
    arguments = make(family)
    out, _ = run(**arguments)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    expected = torch.autograd.grad(out, list(arguments.values()), upstream)
    for name, expected_grad in zip(arguments, expected, strict=True):
        inputs = {other: x.detach().requires_grad_(other == name) for other, x in arguments.items()}
        (gradient,) = torch.autograd.grad(run(**inputs)[0], [inputs[name]], upstream)
        assert torch.equal(gradient, expected_grad), name


@pytest.mark.parametrize("strongest", [-1e4, -1e30, -torch.inf])
@pytest.mark.parametrize(
    "family", ["constant", "scalar", "vector", "gated delta", "gated delta by key"]
)
def test_decays_that_erase_the_state(family, strongest):
    """They hide what came before, and cost the other tokens no precision."""
    arguments = make(family)
    decay = arguments["decay"].detach().clone()
    decay.view(-1)[1::7] = strongest
    arguments["decay"] = decay.requires_grad_()
    for dtype, tolerance in TOLERANCE.items():
        cast = {name: x.detach().to(dtype).requires_grad_() for name, x in arguments.items()}
        error_by_name = errors(with_backend("torch"), cast)
        assert max(error_by_name.values()) < tolerance, (dtype, error_by_name)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [{"length": 0}, {"batch": 0}, {"length": 0, "batch": 0}], ids=str)
def test_empty_inputs(family, shape, backend):
    arguments = make(family, **shape)
    out, state = run(**arguments, backend=backend)
    assert out.shape == arguments["v"].shape
    assert torch.equal(state, arguments["state"])
    gradients = torch.autograd.grad(
        out.sum() + state.sum(), list(arguments.values()), allow_unused=True
    )
    assert torch.equal(gradients[list(arguments).index("state")], torch.ones_like(state))


@pytest.mark.parametrize(
    "shape",
    [{"heads": 1, "key_heads": 1}, {"heads": 6, "key_heads": 2}, {"dim": 5, "value_dim": 16}],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_dims(family, shape):
    error_by_name = errors(with_backend("torch"), make(family, 70, **shape))
    assert max(error_by_name.values()) < 1e-10, error_by_name


def time_slices(arguments, cuts):
    """Yield ``(start, stop)`` and the arguments of each part of the time."""
    edges = [0, *cuts, arguments["q"].shape[1]]
    for start, stop in pairwise(edges):
        yield (
            (start, stop),
            {
                name: x if name == "state" or x.ndim == 1 else x[:, start:stop]
                for name, x in arguments.items()
            },
        )


@pytest.mark.parametrize(
    "cuts",
    [[64], [7, 63, 90, 129], *(pytest.param(cuts, marks=WIDE) for cuts in ([1], [100, 101]))],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_with_carried_state_match_the_whole(family, cuts):
    documents = document_ids([[70, 50, 10], [30, 100]])

    def in_parts(**arguments):
        state = arguments["state"]
        outs = []
        for (start, stop), slices in time_slices(arguments, cuts):
            if start:  # the caller drops the state where a document begins
                same_document = documents[:, start] == documents[:, start - 1]
                state = state * same_document[:, None, None, None]
            out, state = run(**slices | {"state": state}, documents=documents[:, start:stop])
            outs.append(out)
        return torch.cat(outs, 1), state

    arguments = make(family)
    expected = recurrence(**arguments, documents=documents)
    ours = in_parts(**arguments)
    for a, b in zip(ours, expected, strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 1e-10

    def gradients(out, state):
        loss = out.square().sum() + state.square().sum()
        return torch.autograd.grad(loss, list(arguments.values()))

    for a, b in zip(gradients(*ours), gradients(*expected), strict=True):
        assert (a - b).norm() < 1e-10 * b.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_token_by_token_matches_the_whole(family):
    arguments = {name: x.detach() for name, x in make(family, 70, dtype=torch.float32).items()}
    whole, final_state = run(**arguments)
    state = arguments["state"]
    outs = []
    for _, token in time_slices(arguments, range(1, 70)):
        out, state = run(**token | {"state": state})
        outs.append(out)
    assert (torch.cat(outs, 1) - whole).norm() < 1e-5 * whole.norm()
    assert (state - final_state).norm() < 1e-5 * final_state.norm()


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_state_map_gives_the_final_state(family, documents):
    arguments = make(family)
    documents = document_ids(documents)
    kept, added = state_map(
        arguments["k"], arguments["v"], arguments.get("decay"), arguments.get("beta"), documents
    )
    _, final_state = recurrence(**arguments, documents=documents)
    # The delta rule's map is a matrix, the others' a factor for each key dim.
    carried = kept @ arguments["state"] if "beta" in arguments else kept * arguments["state"]
    assert (carried + added - final_state).norm() < 1e-10 * final_state.norm()


MUTATIONS = {
    "decayed once more": lambda arguments: arguments | {"state": arguments["state"] * 0.98},
    "beta of the neighbour": lambda arguments: arguments | {"beta": arguments["beta"].roll(1, 1)},
    "a decay late": lambda arguments: arguments | {"decay": arguments["decay"].roll(1, 1)},
    "keys swapped": lambda arguments: arguments | {"k": arguments["k"].flip(2)},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_arguments_fail_the_comparison(mutation):
    mutate = MUTATIONS[mutation]
    error_by_name = errors(lambda **arguments: run(**mutate(arguments)), make("gated delta by key"))
    assert max(error_by_name.values()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_accumulates_in_fp32(family):
    arguments = {name: x.detach() for name, x in make(family, dtype=torch.float32).items()}
    low = {name: x if name in ("decay", "state") else x.bfloat16() for name, x in arguments.items()}
    exact = recurrence(**{name: x.double() for name, x in low.items()})
    out, state = run(**low)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (out - exact[0]).norm() / exact[0].norm() < 5e-3
    assert (state - exact[1]).norm() / exact[1].norm() < 1e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients(family, backend):
    """Gradients of all inputs, with documents and a scale that bf16 cannot represent."""
    options = {"scale": 24**-0.5, "documents": document_ids(DOCUMENTS["edges"])}
    arguments = make(family, dtype=torch.float32)
    low = {
        n: x.detach().to(x.dtype if n in ("decay", "state") else torch.bfloat16).requires_grad_()
        for n, x in arguments.items()
    }
    exact_inputs = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    out, state = run(**low, **options, backend=backend)
    exact, final_state = recurrence(**exact_inputs, **options)
    assert (out - exact).norm() / exact.norm() < 5e-3
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = torch.autograd.grad((out, state), list(low.values()), (upstream, torch.ones_like(state)))
    expected = torch.autograd.grad(
        (exact, final_state),
        list(exact_inputs.values()),
        (upstream.double(), torch.ones_like(final_state)),
    )
    for name, a, b in zip(arguments, ours, expected, strict=True):
        assert (a - b).norm() / b.norm() < 5e-3, name


def test_only_inputs_and_states_are_saved_for_backward():
    """Results of chunks are not kept between forward and backward."""
    arguments = make("gated delta by key", 1024, heads=2, key_heads=2, batch=1)
    saved_sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved_sizes.append(x.numel()) or x, lambda x: x
    ):
        run(**arguments)
    assert sum(saved_sizes) < 3 * sum(x.numel() for x in arguments.values())


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
def test_errors_name_the_invalid_argument(change, message):
    arguments = {name: torch.zeros(1, 6, 3, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments | change)
