"""The Triton kernels of linear attention in the interpreter, in fp32, against the recurrence: all within 1e-5. CASE ..."""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from longspan.attention import linear_triton

from tests.attention.linear_oracle import errors, make

WEAK, STRONG = [0.0, -0.01, -0.5], [-1.0, -120.0, 0.0]
CASES = {
    "no decay": {},
    "constant decays": {"decay": WEAK},
    "strong decays": {"decay": STRONG, "scale": 0.3},
    "decays of each token": {"decay": "tokens"},
    "one token": {"decay": "tokens", "length": 1},
    "one token short of a chunk": {"decay": WEAK, "length": 63},
    "a chunk": {"decay": "tokens", "length": 64},
    "a chunk and a token": {"decay": WEAK, "length": 65},
    "documents": {"decay": WEAK, "documents": [17, 1, 46, 64, 1, 71]},
    "documents without decay": {"documents": [63, 2, 63, 72]},
    "documents and decays of each token": {"decay": "tokens", "documents": [17, 1, 46, 64, 1, 71], "scale": 0.3},
    "documents of whole segments": {"decay": "tokens", "documents": [64, 64, 64, 8]},
    "grouped heads": {"decay": "tokens", "heads": 6, "key_heads": 2, "documents": [100, 100]},
    "odd dims": {"decay": "tokens", "dim": 24, "value_dim": 40, "scale": 0.3},
    "blocks of dims": {"decay": "tokens", "dim": 72, "value_dim": 100, "heads": 1, "key_heads": 1, "length": 130},
    "one segment": {"decay": "tokens", "documents": [100, 100], "segment": 256},
    "segments of two chunks": {"decay": "tokens", "documents": [90, 120, 90], "segment": 128},
    "strided inputs": {"decay": "tokens", "strided": True},
}


def compare(segment: int = 64, strided: bool = False, **case) -> dict[str, float]:
    linear_triton._segment = lambda *_: segment
    arguments = make(**case)
    if strided:  # heads before time, and dims that are not beside one another
        for name, order in (("q", (0, 2, 1, 3)), ("k", (0, 1, 3, 2)), ("v", (3, 2, 1, 0))):
            x = arguments[name].detach()
            arguments[name] = x.permute(order).contiguous().permute(order).requires_grad_()
    return errors(linear_triton.run, arguments)


def mutants() -> None:
    """Incoming states decayed once too often, and documents that are not told apart, must not pass."""
    launch, case = linear_triton._Walks._launch, {"decay": WEAK, "documents": [100, 100]}

    def late(self, x, y, z, states, *rest, **options):
        """All states at the edges, one decay too late."""
        launch(self, x, y, z, states * self.decay.exp()[:, None, None] if "out" in options else states, *rest, **options)

    def blind(self, *rest, **options):
        launch(replace(self, documents=None), *rest, **options)

    for mutant in (late, blind):
        linear_triton._Walks._launch = mutant
        found = compare(**case)
        assert max(found.values()) > 1e-3, found
    linear_triton._Walks._launch = launch
    assert max(compare(**case).values()) < 1e-5


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name == "mutants":
            mutants()
            continue
        found = compare(**CASES[name])
        assert max(found.values()) < 1e-5, f"{name}: {found}"
        print(name, found, flush=True)
