"""Schedules of softmax attention: exact, and they move what their plans say.

And the plans alone, at sizes that no test can run.
"""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from longspan import attention, parallel
from longspan.attention import (
    S2,
    BlockLists,
    Causal,
    Dilated,
    PerHead,
    Sinks,
    Streaming,
    Stripes,
    Window,
)
from longspan.parallel import Layout, Schedule
from longspan.parallel.schedules.choose import choose_schedule, plan_attention
from longspan.parallel.schedules.names import schedules_named
from longspan.parallel.schedules.plan import BatchRows, batch_rows

from ..test_operations import DOCUMENTS, LAYOUTS, LENGTH, draw, ids, on_one, over_ranks, worst

PATTERNS = {
    "causal": Causal(),
    "s2": S2(4, 2, 3),
    "s2 near": S2(4, 2, 8, near=(5, 2)),
    "s2 dense": S2(4, 1, 3, dense_heads=1),
    "window": Window(7),
    "long window": Window(31),
    "streaming": Streaming(3, 5),
    "stripes": Stripes(4, 3),
    "dilated": Dilated(4, 2, 3) | Sinks(2),
    "each its own": PerHead([Window(9), Causal()]),
    "lists": BlockLists.where(4, lambda i, j, head: (i - j < 2) | (j % 3 == head), LENGTH, 2),
}
SCHEDULES = [
    "ring",
    "gather",
    "stripes",
    "heads",
    "grid",
    "heads 2 x ring",
    "heads 2 x gather",
    "heads 2 x stripes",
    "auto",
]
MORE_LAYOUTS = {
    **LAYOUTS,
    "striped": Layout.striped(LENGTH, 3, 4),
    "striped tokens": Layout.striped(LENGTH, 4, 1),
    "zigzag-8": Layout.zigzag(LENGTH, 8, 2),
}
EACH = [(layout, schedule) for layout in MORE_LAYOUTS for schedule in SCHEDULES]


def inputs_of(heads=4, kv_heads=2, value_dim=8):
    inputs = draw(heads, (LENGTH, heads, 8), (LENGTH, kv_heads, 8), (LENGTH, kv_heads, value_dim))
    inputs[0] *= 5  # peaked
    return inputs, draw(1, (LENGTH, heads, value_dim))[0]


def able(schedule, layout, pattern, heads=4, kv_heads=2):
    return any(
        not one.unsupported_reason(layout.ranks, pattern, heads, kv_heads)
        for one in schedules_named(schedule, layout.ranks)
    )


def attended(threads, layout, pattern, schedule, documents, **shape):
    inputs, upstream = inputs_of(**shape)

    def operation(q, k, v, layout, group):
        return parallel.attend(
            q, k, v, pattern, layout, group, documents=ids(documents), schedule=schedule
        )

    return over_ranks(threads, layout, operation, inputs, upstream)


def expected(pattern, documents, **shape):
    inputs, upstream = inputs_of(**shape)
    return on_one(
        lambda *x: attention.attend(*x, pattern, documents=ids(documents), backend="reference"),
        inputs,
        upstream,
    )


def error(threads, layout, pattern, schedule, documents=None, **shape):
    return worst(
        attended(threads, layout, pattern, schedule, documents, **shape),
        expected(pattern, documents, **shape),
    )


# In the default suite every layout meets every schedule, each with some of the patterns and
# documents in turn.
ROUND = list(itertools.product(PATTERNS, DOCUMENTS))


@pytest.mark.parametrize(("layout", "schedule"), EACH)
def test_every_schedule_gives_what_one_device_does(threads, layout, schedule):
    first, tried = 2 * EACH.index((layout, schedule)), 0
    for pattern, documents in itertools.islice(itertools.cycle(ROUND), first, first + len(ROUND)):
        if tried < 2 and able(schedule, MORE_LAYOUTS[layout], PATTERNS[pattern]):
            tried += 1
            found = error(
                threads, MORE_LAYOUTS[layout], PATTERNS[pattern], schedule, DOCUMENTS[documents]
            )
            assert found < 1e-10, (pattern, documents)


@pytest.mark.wide
@pytest.mark.parametrize(("layout", "schedule"), EACH)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_schedule_with_every_pattern(threads, layout, schedule, pattern):
    """With two of three kinds of documents, in their turn."""
    first = EACH.index((layout, schedule)) + list(PATTERNS).index(pattern)
    for documents in [list(DOCUMENTS)[(first + more) % len(DOCUMENTS)] for more in (0, 2)]:
        if able(schedule, MORE_LAYOUTS[layout], PATTERNS[pattern]):
            found = error(
                threads, MORE_LAYOUTS[layout], PATTERNS[pattern], schedule, DOCUMENTS[documents]
            )
            assert found < 1e-10, documents


@pytest.mark.parametrize(
    ("heads", "kv_heads", "value_dim"), [(4, 1, 16), (4, 4, 4), (8, 2, 8), (12, 2, 8)]
)
@pytest.mark.parametrize("schedule", ["stripes", "heads", "heads 2 x stripes"])
def test_head_ratios_and_value_dims(threads, heads, kv_heads, value_dim, schedule):
    shape = {"heads": heads, "kv_heads": kv_heads, "value_dim": value_dim}
    assert (
        error(
            threads, Layout.zigzag(LENGTH, 4), S2(4, 2, 4), schedule, DOCUMENTS["packed"], **shape
        )
        < 1e-10
    )


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("uneven", "auto"),
        *(("zigzag-4", schedule) for schedule in ("ring", "stripes", "heads", "heads 2 x stripes")),
    ],
)
@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"sigmoid_bias": -2.0}, {"sinks": [0.5, -1.0, 4.0, 9.0]}], ids=str
)
def test_options_under_every_schedule(threads, name, schedule, options):
    """With gradients through the log-sum-exp; those of the sinks, copied on all ranks, add up."""
    layout, lse = LAYOUTS[name], "sigmoid_bias" not in options
    inputs, _ = inputs_of()
    upstream = draw(1, (LENGTH, 4, 8), (LENGTH, 4))

    def run(attend, own, at, upstream, **more):
        leaves = [x.clone().requires_grad_() for x in own]
        if "sinks" in options:
            leaves.append(torch.tensor(options["sinks"], dtype=torch.float64, requires_grad=True))
            more["sinks"] = leaves[3]
        out = attend(
            *leaves[:3],
            S2(4, 2, 3),
            *at,
            documents=ids(DOCUMENTS["packed"]),
            return_lse=lse,
            **{**options, **more},
        )
        outs = out if lse else (out,)
        return [x.detach() for x in outs], torch.autograd.grad(outs, leaves, upstream[: len(outs)])

    def work(rank, group):
        own = ([layout.shard(x, rank) for x in tensors] for tensors in (inputs, upstream))
        shards, upstream_shards = own
        return run(parallel.attend, shards, (layout, group), upstream_shards, schedule=schedule)

    outs, gradients = zip(*threads(layout.ranks, work), strict=True)
    expected_outs, expected_gradients = run(attention.attend, inputs, (), upstream)
    together = [layout.unshard(list(parts)) for parts in zip(*outs, strict=True)]
    together += [layout.unshard([own[n] for own in gradients]) for n in range(3)]
    assert worst(together, [*expected_outs, *expected_gradients[:3]]) < 1e-10
    if "sinks" in options:
        assert worst([sum(own[3] for own in gradients)], expected_gradients[3:]) < 1e-10


@pytest.mark.parametrize("schedule", ["ring", "heads", "heads 2 x ring"])
def test_a_rank_may_leave_its_lse_alone(threads, schedule):
    """Backward has the same collectives on every rank."""
    layout, inputs = Layout.zigzag(LENGTH, 4), inputs_of()[0]

    def run(attend, own, at, lse_weight, **options):
        leaves = [x.clone().requires_grad_() for x in own]
        out, lse = attend(*leaves, S2(4, 2, 3), *at, return_lse=True, **options)
        loss = out.square().sum()
        return torch.autograd.grad(
            loss if lse_weight is None else loss + (lse * lse_weight).sum(), leaves
        )

    def work(rank, group):
        own = [layout.shard(x, rank) for x in inputs]
        return run(
            parallel.attend, own, (layout, group), 1.0 if rank == 1 else None, schedule=schedule
        )

    found = [layout.unshard(list(parts)) for parts in zip(*threads(4, work), strict=True)]
    counts = torch.zeros(1, LENGTH, 1, dtype=torch.float64)
    counts[:, layout.tokens(1)] = 1.0
    assert worst(found, run(attention.attend, inputs, (), counts)) < 1e-10


@pytest.mark.parametrize("schedule", ["ring", "gather", "stripes", "heads", "heads 2 x stripes"])
def test_reruns_are_bitwise_equal(threads, schedule):
    runs = [
        attended(threads, Layout.zigzag(LENGTH, 4), S2(4, 2, 3), schedule, DOCUMENTS["packed"])
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "schedule", ["ring", "gather", "stripes", "heads", "heads 2 x ring", "heads 2 x stripes"]
)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("layout", ["zigzag-4", "uneven", "contiguous-4-blocks"])
def test_what_moves_is_what_the_plan_says(threads, monkeypatch, schedule, documents, layout):
    layout, pattern, documents = LAYOUTS[layout], S2(4, 2, 3), DOCUMENTS[documents]
    sent, received = Counter(), Counter()
    real_to_all, real_gather = dist.all_to_all_single, dist.all_gather_into_tensor

    def width(x):
        return x[0].numel() if x.ndim > 1 and len(x) else 1

    def to_all(output, x, output_split_sizes, input_split_sizes, group=None, **options):
        rank = group.rank()
        sent[dist.get_rank()] += (sum(input_split_sizes) - input_split_sizes[rank]) * width(x)
        received[dist.get_rank()] += (sum(output_split_sizes) - output_split_sizes[rank]) * width(
            output
        )
        return real_to_all(output, x, output_split_sizes, input_split_sizes, group=group, **options)

    def all_gather(output, x, group=None, **options):
        if x.dtype != torch.int64:  # the plans' keys
            received[dist.get_rank()] += output.numel() - x.numel()
            sent[dist.get_rank()] += output.numel() - x.numel()
        return real_gather(output, x, group=group, **options)

    monkeypatch.setattr(dist, "all_to_all_single", to_all)
    monkeypatch.setattr(dist, "all_gather_into_tensor", all_gather)
    attended(threads, layout, pattern, schedule, documents)
    (chosen,) = schedules_named(schedule, layout.ranks)
    rows = batch_rows(ids(documents), 2, layout.length)
    for rank in range(layout.ranks):
        traffic = plan_attention(layout, pattern, 4, 2, rows, chosen, rank).traffic(8, 8)
        assert (sent[rank], received[rank]) == tuple(map(sum, zip(*traffic, strict=True))), rank


@pytest.mark.parametrize("change", ["pattern", "schedule", "rows", "documents"])
def test_ranks_that_differ_are_told_so_and_do_not_hang(threads, change):
    layout, inputs = Layout.zigzag(LENGTH, 4), inputs_of()[0]

    def work(rank, group):
        odd = rank == 2
        pattern = Window(9) if odd and change == "pattern" else Window(8)
        documents = DOCUMENTS["packed" if odd and change == "documents" else "tiny"]
        schedule = (
            {"schedule": "gather", "rows": "heads 2 x ring"}.get(change, "ring") if odd else "ring"
        )
        own = [layout.shard(x, rank) for x in inputs]
        with pytest.raises(
            RuntimeError, match="rank 2 of the group is about to do something different from rank 0"
        ):
            parallel.attend(
                *own, pattern, layout, group, documents=ids(documents), schedule=schedule
            )

    threads(4, work)


def test_a_stripe_offset_by_one_is_caught(threads, monkeypatch):
    from longspan.parallel.schedules import near_far

    real = near_far.visible_keys

    def moved(documents, rules):
        return real(
            documents,
            tuple(replace(rule, residue=(rule.residue + 1) % rule.step) for rule in rules),
        )

    monkeypatch.setattr(near_far, "visible_keys", moved)
    assert error(threads, Layout.zigzag(LENGTH, 2), S2(4, 2, 3), "stripes") > 1e-3


def test_a_halo_one_short_is_caught(threads, monkeypatch):
    from longspan.parallel.schedules.near_far import NearFarRules

    real = NearFarRules.halo

    def short(rules, rows, start, *rest):
        return real(rules, rows, start, *rest).clip(0, start - 1)

    monkeypatch.setattr(NearFarRules, "halo", short)
    assert error(threads, Layout.zigzag(LENGTH, 2), Window(7), "stripes") > 1e-3


def test_two_segments_swapped_are_caught(threads):
    swapped = Layout((((0, 13), (26, 39)), ((13, 26), (39, 52))))
    inputs, upstream = inputs_of()
    for schedule in ("ring", "stripes", "heads"):

        def operation(q, k, v, layout, group, schedule=schedule):
            return parallel.attend(q, k, v, S2(4, 2, 3), layout, group, schedule=schedule)

        found = over_ranks(
            threads, LAYOUTS["zigzag-2"], operation, inputs, upstream, mutated=swapped
        )
        assert worst(found, expected(S2(4, 2, 3), None)) > 1e-3


@pytest.mark.parametrize(
    ("schedule", "heads", "kv_heads", "message"),
    [
        (
            "rings",
            4,
            2,
            "schedule must be one of auto, stripes, ring, gather, heads, grid, "
            "or as 'heads 4 x ring'",
        ),
        (
            "heads",
            6,
            2,
            "schedule heads cannot do this: 6 query heads do not split over 4 ranks; "
            "ring supports any number of heads",
        ),
        (
            "heads",
            12,
            3,
            "3 KV heads neither split over 4 ranks nor the ranks over them; "
            "ring supports any number of heads",
        ),
        ("heads 3 x ring", 6, 3, "4 ranks do not split into groups of 3"),
        (Schedule("ring", 8), 8, 8, "4 ranks do not split into groups of 8"),
    ],
)
def test_what_a_schedule_cannot_do_is_told(threads, schedule, heads, kv_heads, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        attended(
            threads,
            Layout.zigzag(LENGTH, 4),
            Causal(),
            schedule,
            None,
            heads=heads,
            kv_heads=kv_heads,
        )


def test_chosen_blocks_take_no_heads(threads):
    with pytest.raises(ValueError, match=r"blocks that are chosen from the content .* use ring"):
        attended(threads, Layout.zigzag(LENGTH, 2, 4), attention.MoBA(4, 3), "heads", None)


# The size of the papers: 1M tokens, 32 query and 8 KV heads of 128 dims, S2 with a band of 8K.
MILLION, MIB = 1 << 20, 1 << 20
SPARSE = S2(64, 128, 16).spread(8)


def received_mib(ranks, schedule, looked_at, pattern=SPARSE):
    layout, rows = Layout.zigzag(MILLION, ranks, 64), (BatchRows(0, 1, (0,), MILLION),)
    plans = [plan_attention(layout, pattern, 32, 8, rows, schedule, rank) for rank in looked_at]
    return max(plan.traffic(128, 128)[0].received * 2 / MIB for plan in plans)


def needed_mib(ranks, looked_at):
    """What a rank's queries see of others, block by block."""
    layout, most = Layout.zigzag(MILLION, ranks, 64), 0
    for rank in looked_at:
        blocks = 0
        for head in range(8):
            seen = np.zeros(MILLION // 64, bool)
            for start, stop in layout.segments[rank]:
                for part in SPARSE.need(start, stop, head):
                    assert part.size == 64
                    seen[part.start + part.step * np.arange(part.count)] = True
            for start, stop in layout.segments[rank]:
                seen[start // 64 : -(-stop // 64)] = False
            blocks += int(seen.sum())
        most = max(most, blocks * 64 * 256 * 2 / MIB)
    return most


@pytest.mark.parametrize("ranks", [8, 12, 64, 96, 1000, 1024, 4096])
def test_stripes_move_hardly_more_than_is_needed(ranks):
    # The rank that needs most is among those whose band no longer reaches the sequence's start.
    edge = 8192 * 2 * ranks // MILLION
    looked_at = sorted(
        {min(ranks - 1, rank) for rank in (0, 1, edge, edge + 1, edge + 2, ranks // 2, ranks - 1)}
    )
    power = ranks & (ranks - 1) == 0
    moved = received_mib(ranks, Schedule("stripes"), looked_at)
    assert moved <= (1.10 if power else 1.15) * needed_mib(ranks, looked_at)
    if ranks == 64:
        assert moved < 0.1 * received_mib(64, Schedule("ring"), [0])
    if ranks > 80 and ranks % 8 == 0:
        assert received_mib(ranks, Schedule("stripes", 8), looked_at) < moved
    chosen = (
        choose_schedule("auto", Layout.zigzag(MILLION, ranks, 64), SPARSE, 32, 8, (128, 128))
        if ranks < 100
        else None
    )
    assert chosen is None or chosen.kv_schedule == "stripes"


@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("schedule", ["ring", "gather", "stripes", "heads 2 x stripes"])
def test_gpu_kernels_take_the_tiles(backend, schedule):
    """Wherever documents begin, only blocks of the stripes are given at equal distances."""
    layout = Layout.zigzag(1024, 4)
    for pattern in (
        (Causal(), Window(300))
        if backend == "flash"
        else (Causal(), S2(64, 2, 4), S2(64, 2, 8, near=(4, 2)), None)
    ):
        (one,) = schedules_named(schedule, 4)
        if pattern is None and one.kv_schedule == "stripes":
            continue
        for starts in ((0,), (0, 100, 192, 700)):
            for rank in range(4):
                rows = (BatchRows(0, 1, starts, 1024),)
                for stage in plan_attention(layout, pattern, 4, 2, rows, one, rank).stages:
                    for job in stage.jobs:
                        steps = {
                            blocks.size
                            for blocks in (job.q_positions, job.k_positions)
                            if blocks.step > 1
                        }
                        assert steps <= (set() if backend == "flash" or pattern is None else {64})


def test_one_rank_takes_any_schedule(threads):
    for schedule in ("grid", "heads", "heads 2 x ring", "stripes"):
        assert error(threads, Layout.zigzag(LENGTH, 1), S2(4, 2, 3), schedule) < 1e-10


def test_a_ring_moves_no_more_than_it_must():
    """Dense causal: keys ahead of all queries stay where they are, and none is sent twice."""
    layout, rows = Layout.contiguous(64, 4), (BatchRows(0, 1, (0,), 64),)
    for rank in range(4):
        forward, _ = plan_attention(layout, Causal(), 1, 1, rows, Schedule("ring"), rank).traffic(
            1, 1
        )
        assert forward.received == 2 * 16 * rank
    window = plan_attention(layout, Window(5), 1, 1, rows, Schedule("ring"), 3).traffic(1, 1)[0]
    assert window.received == 2 * 4
