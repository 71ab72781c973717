"""Compare linear attention's Triton kernels, interpreted in fp32, with the recurrence.

All errors must be below 1e-5. Arguments: CASE ...
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from longspan.attention.linear.triton import backend, scalar

from tests.attention.linear.recurrence import document_ids, errors, make

EDGES = [
    [17, 1, 46, 64, 1, 71],
    [3, 125, 2, 70],
]  # they begin inside chunks, on their edges, and several in one chunk
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
    "strided": {"family": "scalar", "strided": True, "length": 70},
}


def run(q, k, v, state, decay=None, scale=1.0, documents=None):
    return backend.forward(q, k, v, decay, None, scale, state, documents)


def compare(
    segment=64, strided=False, resets=False, scale=1.0, documents=None, **shape
) -> dict[str, float]:
    scalar._segment = lambda *_: segment
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

    def without_documents(self, *rest, **options):
        launch(replace(self, documents=None), *rest, **options)

    for mutant in (extra_decay, without_documents):
        scalar._Scan._launch = mutant
        error_by_name = compare(family="constant", length=130, documents=[[100, 30], [30, 100]])
        assert max(error_by_name.values()) > 1e-3, error_by_name


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name == "mutants":
            mutants()
            continue
        error_by_name = compare(**CASES[name])
        assert max(error_by_name.values()) < 1e-5, f"{name}: {error_by_name}"
        print(name, error_by_name, flush=True)
