"""Compare the Triton kernels, interpreted in fp32, with the dense formula: errors below 1e-5.

Arguments: CASE ...
"""

import os
import sys
from dataclasses import replace
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
from longspan.attention.softmax.backends import backward_, forward_
from longspan.attention.softmax.tile_batch import Document, TileBatch, TilePlace
from longspan.attention.softmax.tiles import Gradients, LogitOptions
from longspan.attention.softmax.triton import rule_table

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
    has_lse = options.get("sigmoid_bias") is None

    def run():
        result = attend(
            *inputs, pattern, documents=ids, backend="triton", return_lse=has_lse, **options
        )
        return result if has_lse else (result, None)

    if pattern is SELECTED:  # the oracle has one pattern for all rows: compare with each row alone
        inputs = [x.detach() for x in inputs]
        outs = attend(*inputs, pattern, backend="triton")
        outs_alone = []
        for b in range(batch):
            row_inputs = [x[b : b + 1].clone().requires_grad_() for x in inputs]
            row_pattern = BlockLists(16, pattern.lists[b])
            outs_alone.append(attend(*row_inputs, row_pattern, backend="triton"))
        return {"rows": relative(outs, torch.cat(outs_alone).double())}
    return errors(run, inputs, pattern=pattern, documents=ids, **options)


def tiles() -> dict[str, float]:
    """Compare merged tiles with the whole: keys in parts, one of them a compact buffer of stripes.

    Two documents, of which each launch has a part, and two rows of the batch.
    """
    pattern = S2(16, 1, 3)
    length = 112
    documents = (Document(0, length), Document(length, 2 * length))
    q, k, v = (x.detach() for x in make(2, 2 * length, 2, 1, 16, None, torch.float32))
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    logits = LogitOptions(0.25)
    whole = TileBatch.of_documents(
        2, 2 * length, [(b, *each) for b in range(2) for each in documents]
    )
    call = (pattern, logits)

    def computed(batches, kind, backend):
        q, k, v, upstream = (x.to(kind) for x in (q_k_v_upstream))
        out = torch.full_like(q, torch.nan)
        lse = torch.full(q.shape[:3], torch.nan, dtype=kind)
        for batch, keys in batches:
            forward_(q, k[:, keys], v[:, keys], *call, batch, backend, out, lse)
        gradients = [torch.zeros_like(x) for x in (q, k, v)]
        for batch, keys in batches:
            parts = Gradients(
                gradients[0], torch.zeros_like(k[:, keys]), torch.zeros_like(v[:, keys]), True
            )
            backward_(
                upstream, q, k[:, keys], v[:, keys], out, lse, None, *call, batch, backend, parts
            )
            gradients[1][:, keys] += parts.k
            gradients[2][:, keys] += parts.v
        return out, lse, *gradients

    q_k_v_upstream = (q, k, v, upstream)
    expected = computed([(whole, slice(None))], torch.float64, "reference")

    # The seven blocks of keys in parts: the stripes 0, 3 and 6; most of the blocks between them, as
    # two ranges; and the rest, half a block.
    key_parts = [Blocks(0, 3, 3, 16), Blocks(16, 1, 24), Blocks(64, 1, 32), Blocks(40, 1, 8)]
    batches = []
    for queries in (Blocks(0, 1, 50), Blocks(50, 1, 62)):
        for part in key_parts:
            keys = torch.cat(
                [each.start + torch.from_numpy(part.positions()) for each in documents]
            )
            places = tuple(
                TilePlace(
                    slice(0, 2),
                    slice(each.start + queries.start, each.start + queries.start + len(queries)),
                    slice(number * len(part), (number + 1) * len(part)),
                    each,
                    queries,
                    part,
                )
                for number, each in enumerate(documents)
            )
            batches.append((TileBatch(places, is_first=part is key_parts[0]), keys))
    ours = computed(batches, torch.float32, "triton")
    names = ("out", "lse", "q", "k", "v")
    return {name: relative(a, b) for name, a, b in zip(names, ours, expected, strict=True)}


def mutants() -> None:
    """Check that a stripe off by one, or a band one block too short, fails the comparison."""
    table_row = rule_table._table_row

    def shifted_stripe(rule, keys, size):
        if rule is not None and rule.step != 1:
            rule = replace(rule, residue=(rule.residue + 1) % rule.step)
        return table_row(rule, keys, size)

    def shortened_band(rule, keys, size):
        if rule is not None and rule.is_band and rule.reach:
            rule = replace(rule, reach=rule.reach - 1)
        return table_row(rule, keys, size)

    for mutant in (shifted_stripe, shortened_band):
        rule_table._table_row = mutant
        rule_table.rule_table.cache_clear()
        error_by_name = compare(S2(16, 2, 3))
        assert min(error_by_name.values()) > 1e-3, error_by_name


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name == "mutants":
            mutants()
            continue
        error_by_name = tiles() if name == "tiles" else compare(**CASES[name])
        assert max(error_by_name.values()) < 1e-5, f"{name}: {error_by_name}"
        print(name, error_by_name, flush=True)
