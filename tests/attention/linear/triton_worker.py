"""Compare linear attention's Triton kernels, interpreted in fp32, with the recurrence.

All errors must be below 1e-5. Arguments: CASE ...
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from longspan.attention.linear.triton import backend, scalar, stages

from tests.attention.linear.recurrence import document_ids, errors, make

EDGES = [
    [17, 1, 46, 64, 1, 71],
    [3, 125, 2, 70],
]  # they begin inside chunks, on their edges, and several in one chunk
FEW_EDGES = [[5, 1, 64], [38, 32]]
CASES = {
    "no decay": {"family": "none"},
    "constant": {"family": "constant", "scale": 0.3},
    "constant, strong": {"family": "constant", "strength": 120.0, "length": 130},
    "per token": {"family": "scalar", "scale": 0.3},
    "per token, strong": {"family": "scalar", "strength": 150.0, "length": 130},
    "per token, resets": {"family": "scalar", "resets": True},
    "constant, documents": {"family": "constant", "documents": EDGES},
    "per token, documents": {"family": "scalar", "documents": EDGES, "scale": 0.3},
    "per token, documents of whole chunks": {
        "family": "scalar",
        "documents": [[64, 64, 72], [128, 72]],
    },
    "no decay, documents": {"family": "none", "documents": EDGES},
    "one token": {"family": "scalar", "length": 1},
    "63 tokens": {"family": "constant", "length": 63},
    "64 tokens": {"family": "scalar", "length": 64},
    "65 tokens": {"family": "constant", "length": 65},
    "one segment": {"family": "scalar", "documents": EDGES, "segment": 256},
    "segments of two chunks": {
        "family": "scalar",
        "documents": [[100, 100], [200]],
        "segment": 128,
    },
    "two heads for each key": {"family": "scalar", "heads": 4, "key_heads": 2, "length": 70},
    "a head for each": {
        "family": "scalar",
        "heads": 3,
        "key_heads": 3,
        "dim": 24,
        "value_dim": 40,
        "length": 70,
    },
    "blocks of dims": {
        "family": "scalar",
        "heads": 1,
        "key_heads": 1,
        "dim": 72,
        "value_dim": 100,
        "length": 70,
    },
    "large dims": {
        "family": "scalar", "heads": 1, "key_heads": 1, "dim": 153, "value_dim": 130, "length": 40,
    },
    "strided": {"family": "scalar", "strided": True, "length": 70},
    # In stages.
    "large values": {
        "family": "scalar", "heads": 1, "key_heads": 1, "dim": 20, "value_dim": 300, "length": 40,
    },
    "delta": {"family": "delta", "scale": 0.3, "length": 70},
    "delta, documents": {"family": "delta", "documents": EDGES},
    "gated delta": {"family": "gated delta", "scale": 0.3, "length": 70},
    "gated delta, documents": {"family": "gated delta", "documents": EDGES},
    "gated delta, strong": {"family": "gated delta", "strength": 150.0, "length": 70},
    "gated delta, resets": {"family": "gated delta", "resets": True, "length": 70},
    "vector": {"family": "vector", "scale": 0.3, "length": 70},
    "vector, documents": {"family": "vector", "documents": EDGES},
    "vector, strong": {"family": "vector", "strength": 150.0, "length": 70},
    "vector, resets": {"family": "vector", "resets": True, "length": 70},
    "gated delta by key, documents": {
        "family": "gated delta by key", "scale": 0.3, "length": 70, "documents": FEW_EDGES,
    },
    "gated delta by key, many documents": {"family": "gated delta by key", "documents": EDGES},
    "gated delta by key, strong": {
        "family": "gated delta by key", "strength": 150.0, "length": 70,
    },
    "gated delta by key, resets": {"family": "gated delta by key", "resets": True, "length": 70},
    "gated delta, chunks of 64": {
        "family": "gated delta", "documents": [[70, 130], [1, 129, 70]], "capability": 90,
    },
    "gated delta by key, chunks of 64": {
        "family": "gated delta by key", "length": 130, "capability": 90,
    },
    "gated delta, two heads for each key": {
        "family": "gated delta", "heads": 4, "key_heads": 2, "length": 40,
    },
    "gated delta by key, blocks of dims": {
        "family": "gated delta by key", "heads": 1, "key_heads": 1, "dim": 72, "value_dim": 100,
        "length": 40,
    },
    "gated delta, strided": {"family": "gated delta", "strided": True, "length": 40},
    "vector, one token": {"family": "vector", "length": 1},
    "delta, equal keys": {"family": "delta", "equal_keys": True, "length": 70},
}  # fmt: skip


def run(q, k, v, state, decay=None, beta=None, scale=1.0, documents=None):
    return backend.forward(q, k, v, decay, beta, scale, state, documents)


def compare(
    segment=64,
    strided=False,
    resets=False,
    equal_keys=False,
    capability=0,
    scale=1.0,
    documents=None,
    **shape,
) -> dict[str, float]:
    scalar._segment = lambda *_: segment
    stages.compute_capability = lambda _: capability
    arguments = make(**{"heads": 2, "key_heads": 1, "length": 200} | shape, dtype=torch.float32)
    if resets:  # some decays erase the state, among weak ones whose sum must stay precise
        kinds = torch.arange(arguments["decay"].numel()).view_as(arguments["decay"]) % 37
        arguments["decay"] = (
            arguments["decay"]
            .detach()
            .masked_fill(kinds == 5, -1000.0)
            .masked_fill(kinds == 17, -100.0)
            .requires_grad_()
        )
    if equal_keys:  # powers of what is inverted grow as binomial coefficients
        k = arguments["k"].detach()
        arguments["k"] = k[:, :1].expand_as(k).clone().requires_grad_()
        arguments["beta"] = torch.ones_like(arguments["beta"]).requires_grad_()
    if strided:  # heads before time, and dims that are not contiguous
        for name, order in {"q": (0, 2, 1, 3), "k": (0, 1, 3, 2), "v": (3, 2, 1, 0)}.items():
            arguments[name] = (
                arguments[name].detach().permute(order).contiguous().permute(order).requires_grad_()
            )
    return errors(run, arguments, scale=scale, documents=document_ids(documents))


def mutants() -> None:
    """Check that states decayed once more, or ignored documents, fail the comparison."""
    launch = scalar._Scan._launch

    def extra_decay(self, x, y, z, states, *rest, **options):
        if "out" in options:
            states = states * self.decay.exp()[:, None, None]
        launch(self, x, y, z, states, *rest, **options)

    case = {"family": "constant", "length": 130, "documents": [[100, 30], [30, 100]]}
    with patch.object(scalar._Scan, "_launch", extra_decay):
        assert_fails(**case)
    with patch.object(scalar, "pieces_of", without_documents(scalar.pieces_of)):
        assert_fails(**case)


def stages_mutants() -> None:
    """Check that wrong stages fail the comparison."""
    case = {"family": "gated delta by key", "length": 70, "documents": FEW_EDGES}
    with patch.object(stages, "pieces_of", without_documents(stages.pieces_of)):
        assert_fails(**case)

    scores = stages._Stages.scores
    for change in (
        lambda x: {"carry": x.carry * 0.9},
        lambda x: {"inverse": x.inverse * 0.9},
        lambda x: {"scores": x.scores * 0.9},
        lambda x: {"writing": x.recalling},
    ):

        def mutant(self, change=change):
            result = scores(self)
            return result._replace(**change(result))

        with patch.object(stages._Stages, "scores", mutant):
            assert_fails(**case)


def without_documents(pieces_of):
    return lambda documents, *rest: pieces_of(None, *rest)


def assert_fails(**case) -> None:
    error_by_name = compare(**case)
    assert max(error_by_name.values()) > 1e-3, error_by_name


def isolation(family: str) -> None:
    """Check that NaN in all that one document holds changes no bit of the others' results."""
    documents = document_ids([[20, 9, 41], [1, 69]])
    spoiled = slice(20, 29)  # of the first row, within a chunk that holds other documents
    arguments = {
        name: x.detach()
        for name, x in make(
            family, 70, heads=2, key_heads=1, dim=8, value_dim=5, dtype=torch.float32
        ).items()
    }
    upstream = torch.randn(2, 70, 2, 5, generator=torch.Generator().manual_seed(0))

    def results(arguments, upstream):
        leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
        out, last = run(**leaves, documents=documents)
        ones = torch.ones_like(last)
        gradients = torch.autograd.grad((out, last), list(leaves.values()), (upstream, ones))
        return {"out": out, "last": last} | dict(zip(leaves, gradients, strict=True))

    clean = results(arguments, upstream)
    with_nan = {name: x.clone() for name, x in arguments.items()}
    nan_upstream = upstream.clone()
    for x in (*with_nan.values(), nan_upstream):
        if x.shape[1] == 70:
            x[0, spoiled] = torch.nan
    found = results(with_nan, nan_upstream)
    for name, x in found.items():
        if x.shape[:2] == (2, 70):
            assert x[0, spoiled].isnan().any(), name
            x = torch.cat([x[0, :20], x[0, 29:], x[1]])
            expected = torch.cat([clean[name][0, :20], clean[name][0, 29:], clean[name][1]])
        elif x.ndim == 1:
            continue  # a decay of all tokens
        else:
            expected = clean[name]
        assert torch.equal(x, expected), name


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name == "mutants":
            mutants()
        elif name == "mutants of stages":
            stages_mutants()
        elif name.startswith("isolation: "):
            isolation(name.removeprefix("isolation: "))
        else:
            error_by_name = compare(**CASES[name])
            assert max(error_by_name.values()) < 1e-5, f"{name}: {error_by_name}"
            print(name, error_by_name, flush=True)
