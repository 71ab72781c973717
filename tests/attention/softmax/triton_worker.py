"""The Triton kernels in the interpreter, in fp32, against the dense formula: all within 1e-5.

Arguments: CASE ...
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from longspan.attention import (
    S2,
    BlockLists,
    Causal,
    Dilated,
    PerHead,
    Sinks,
    Stripes,
    Window,
    attend,
)
from longspan.attention.patterns.rules import Blocks
from longspan.attention.softmax.backends import tile_backward, tile_forward
from longspan.attention.softmax.tiles import LogitOptions, Tile, merge_
from longspan.attention.softmax.triton import backend as triton_backend

from tests.attention.softmax.oracle import document_ids, errors, make, relative

SINKS = torch.tensor([-1.0, 2.0, 9.0, 0.5])
LISTS = BlockLists.where(16, lambda i, j, h: (i * 7 + j * 3 + h) % 5 < 2, 120, num_kv_heads=2)
SELECTED = BlockLists(16, torch.stack([LISTS.lists, LISTS.lists.flip(-3)]))
UNEVEN = PerHead([Sinks(3) | Stripes(16, 4, 1) | Window(8), Sinks(64) | Stripes(16, 4) | Window(8)])
EACH = PerHead([Causal(), S2(16, 1, 3) | Sinks(3), Window(9), Dilated(16, 2, 9) | Sinks(20)])

CASES = {
    "causal": {"pattern": Causal()},
    "s2": {"pattern": S2(16, 2, 3), "heads": 4},
    "window": {"pattern": Window(20), "length": 77},
    "streaming": {"pattern": Sinks(5) | Window(20)},
    "stripes alone": {"pattern": Stripes(16, 3, 1)},
    "dilated": {"pattern": Dilated(16, 2, 3)},
    "two ranges": {"pattern": S2(16, 1, 8, near=(4, 2)), "length": 160},
    "all at once": {
        "pattern": S2(32, 1, 3) | Sinks(40) | Window(10) | Dilated(16, 3, 4),
        "length": 150,
    },
    "two dilations": {
        "pattern": Dilated(16, 3, 4) | Dilated(32, 2, 2) | Stripes(16, 4),
        "length": 150,
    },
    "each head its own": {"pattern": EACH, "heads": 4, "kv_heads": 4, "length": 70},
    "other sinks in each head": {"pattern": UNEVEN, "length": 96},
    "lists": {"pattern": LISTS, "length": 90},
    "lists of each row": {"pattern": SELECTED, "batch": 2, "length": 90},
    "documents": {"pattern": S2(16, 1, 3), "documents": [40, 16, 30]},
    "documents and lists": {"pattern": LISTS, "documents": [40, 16, 30]},
    "shorter than the stride": {"pattern": S2(16, 1, 64), "length": 45},
    "grouped queries": {"pattern": S2(16, 1, 3), "heads": 6, "kv_heads": 2, "length": 60},
    "sink and softcap": {
        "pattern": S2(16, 1, 3),
        "heads": 4,
        "sinks": SINKS.requires_grad_(),
        "softcap": 5.0,
        "length": 70,
    },
    "sigmoid": {"pattern": S2(16, 1, 3), "sigmoid_bias": -4.0, "length": 70},
    "sigmoid and softcap on lists": {
        "pattern": LISTS,
        "sigmoid_bias": -2.0,
        "softcap": 6.0,
        "length": 70,
    },
    "odd dims": {"pattern": S2(16, 1, 3), "dim": 24, "value_dim": 40, "length": 60},
}


def compare(
    pattern,
    batch=1,
    length=100,
    heads=2,
    kv_heads=2,
    dim=16,
    value_dim=None,
    documents=None,
    **options,
):
    inputs = make(batch, length, heads, kv_heads, dim, value_dim, torch.float32)
    ids = (
        document_ids(documents, batch)
        if batch > 1 or documents is None
        else document_ids(documents)[:1]
    )
    if documents is not None:
        inputs = make(1, sum(documents), heads, kv_heads, dim, value_dim, torch.float32)
    lse = options.get("sigmoid_bias") is None

    def run():
        out = attend(*inputs, pattern, documents=ids, backend="triton", return_lse=lse, **options)
        return out if lse else (out, None)

    if pattern is SELECTED:  # the oracle takes one row at a time
        inputs = [x.detach() for x in inputs]
        rows = [[x[b : b + 1].clone().requires_grad_() for x in inputs] for b in range(batch)]
        found = [BlockLists(16, pattern.lists[b]) for b in range(batch)]
        outs = attend(*inputs, pattern, backend="triton")
        alone = [attend(*row, own, backend="triton") for row, own in zip(rows, found, strict=True)]
        return {"rows": relative(outs, torch.cat(alone).double())}
    return errors(run, inputs, pattern=pattern, documents=ids, **options)


def tiles() -> dict[str, float]:
    """Queries and keys in parts, keys in a compact buffer of stripes: merged, the whole."""
    pattern, length = S2(16, 1, 3), 112
    q, k, v = (x.detach() for x in make(1, length, 2, 1, 16, None, torch.float32))
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    logits = LogitOptions(0.25)
    whole = Tile(pattern, (Blocks(0, 1, length),), (Blocks(0, 1, length),), logits)
    out, lse = tile_forward(q.double(), k.double(), v.double(), whole, "reference")
    expected = tile_backward(
        upstream.double(), *(x.double() for x in (q, k, v)), out, lse, whole, "reference"
    )
    # Of seven blocks the stripes 0, 3 and 6, what is between them in two parts, and half a block.
    parts = [(Blocks(0, 3, 3, 16),), (Blocks(16, 1, 24), Blocks(64, 1, 32)), (Blocks(40, 1, 8),)]
    ours = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    q_positions = (Blocks(0, 1, 50), Blocks(50, 1, 62))
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for part in parts:
        rows = torch.cat([torch.from_numpy(blocks.positions()) for blocks in part])
        tile = Tile(pattern, q_positions, part, logits)
        merge_(*ours, *tile_forward(q, k[:, rows], v[:, rows], tile, "triton"), logits)
        own = tile_backward(
            upstream, q, k[:, rows], v[:, rows], out.float(), lse.float(), tile, "triton"
        )
        for total, gradient, index in zip(gradients, own, (slice(None), rows, rows), strict=True):
            total[:, index] += gradient
    found = zip(
        ("out", "lse", "q", "k", "v"), (*ours, *gradients), (out, lse, *expected), strict=True
    )
    return {name: relative(a, b) for name, a, b in found}


def mutants() -> None:
    """A stripe off by one and a band a block short must not pass."""
    row = triton_backend._table_row

    def stripe(rule, keys, size):
        shifted = (
            None
            if rule is None or rule.step == 1
            else triton_backend.replace(rule, residue=(rule.residue + 1) % rule.step)
        )
        return row(shifted or rule, keys, size)

    def band(rule, keys, size):
        short = rule is not None and rule.is_band and rule.reach
        return row(
            triton_backend.replace(rule, reach=rule.reach - 1) if short else rule, keys, size
        )

    for mutant in (stripe, band):
        triton_backend._table_row = mutant
        triton_backend._rule_table.cache_clear()
        triton_backend._rule_table_on.cache_clear()
        found = compare(S2(16, 2, 3))
        assert min(found.values()) > 1e-3, found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name == "mutants":
            mutants()
            continue
        found = tiles() if name == "tiles" else compare(**CASES[name])
        assert max(found.values()) < 1e-5, f"{name}: {found}"
        print(name, found, flush=True)
