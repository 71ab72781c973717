"""Schedules of softmax attention: they are exact, and their traffic is what their plans say.

Plans alone are also tested, at sizes that no test could run.
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

from ..test_operations import (
    DOCUMENTS,
    LAYOUTS,
    LENGTH,
    document_ids,
    draw,
    max_error,
    on_one_device,
    over_ranks,
)

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
ALL_LAYOUTS = {
    **LAYOUTS,
    "striped": Layout.striped(LENGTH, 3, 4),
    "striped tokens": Layout.striped(LENGTH, 4, 1),
    "zigzag-8": Layout.zigzag(LENGTH, 8, 2),
}
LAYOUTS_AND_SCHEDULES = [(layout, schedule) for layout in ALL_LAYOUTS for schedule in SCHEDULES]


def make_inputs(heads=4, kv_heads=2, value_dim=8):
    inputs = draw(heads, (LENGTH, heads, 8), (LENGTH, kv_heads, 8), (LENGTH, kv_heads, value_dim))
    inputs[0] *= 5  # peaked
    return inputs, draw(1, (LENGTH, heads, value_dim))[0]


def is_supported(schedule, layout, pattern, heads=4, kv_heads=2):
    return any(
        not candidate.unsupported_reason(layout.ranks, pattern, heads, kv_heads)
        for candidate in schedules_named(schedule, layout.ranks)
    )


def attend_over_ranks(threads, layout, pattern, schedule, documents, **shape):
    inputs, upstream = make_inputs(**shape)

    def operation(q, k, v, layout, group):
        return parallel.attend(
            q, k, v, pattern, layout, group, documents=document_ids(documents), schedule=schedule
        )

    return over_ranks(threads, layout, operation, inputs, upstream)


def attend_on_one_device(pattern, documents, **shape):
    inputs, upstream = make_inputs(**shape)
    return on_one_device(
        lambda *x: attention.attend(
            *x, pattern, documents=document_ids(documents), backend="reference"
        ),
        inputs,
        upstream,
    )


def attend_error(threads, layout, pattern, schedule, documents=None, **shape):
    return max_error(
        attend_over_ranks(threads, layout, pattern, schedule, documents, **shape),
        attend_on_one_device(pattern, documents, **shape),
    )


# The default suite runs every schedule on every layout, each time with the next supported
# combination of pattern and documents.
PATTERNS_AND_DOCUMENTS = list(itertools.product(PATTERNS, DOCUMENTS))
SUPPORTED = [
    (layout, schedule)
    for layout, schedule in LAYOUTS_AND_SCHEDULES
    if any(is_supported(schedule, ALL_LAYOUTS[layout], pattern) for pattern in PATTERNS.values())
]


@pytest.mark.parametrize(("layout", "schedule"), SUPPORTED)
def test_every_schedule_matches_one_device(threads, layout, schedule):
    first = 2 * LAYOUTS_AND_SCHEDULES.index((layout, schedule))
    combinations = itertools.islice(
        itertools.cycle(PATTERNS_AND_DOCUMENTS), first, first + len(PATTERNS_AND_DOCUMENTS)
    )
    pattern, documents = next(
        (pattern, documents)
        for pattern, documents in combinations
        if is_supported(schedule, ALL_LAYOUTS[layout], PATTERNS[pattern])
    )
    error = attend_error(
        threads, ALL_LAYOUTS[layout], PATTERNS[pattern], schedule, DOCUMENTS[documents]
    )
    assert error < 1e-10, (pattern, documents)


@pytest.mark.wide
@pytest.mark.parametrize(("layout", "schedule"), LAYOUTS_AND_SCHEDULES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_schedule_with_every_pattern_matches_one_device(threads, layout, schedule, pattern):
    """Each case runs with two of the three kinds of documents, which alternate."""
    first = LAYOUTS_AND_SCHEDULES.index((layout, schedule)) + list(PATTERNS).index(pattern)
    for offset in (0, 2):
        documents = list(DOCUMENTS)[(first + offset) % len(DOCUMENTS)]
        if is_supported(schedule, ALL_LAYOUTS[layout], PATTERNS[pattern]):
            error = attend_error(
                threads, ALL_LAYOUTS[layout], PATTERNS[pattern], schedule, DOCUMENTS[documents]
            )
            assert error < 1e-10, documents


@pytest.mark.parametrize(
    ("heads", "kv_heads", "value_dim"), [(4, 1, 16), (4, 4, 4), (8, 2, 8), (12, 2, 8)]
)
@pytest.mark.parametrize("schedule", ["stripes", "heads", "heads 2 x stripes"])
def test_head_ratios_and_value_dims(threads, heads, kv_heads, value_dim, schedule):
    shape = {"heads": heads, "kv_heads": kv_heads, "value_dim": value_dim}
    assert (
        attend_error(
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
def test_options_of_attend_match_one_device(threads, name, schedule, options):
    """Gradients also flow through the log-sum-exp.

    The sinks are copied on all ranks, so their gradients are summed over the ranks.
    """
    layout = LAYOUTS[name]
    has_lse = "sigmoid_bias" not in options
    inputs, _ = make_inputs()
    upstream = draw(1, (LENGTH, 4, 8), (LENGTH, 4))

    def run(attend, qkv, layout_and_group, upstream, **schedule_options):
        leaves = [x.clone().requires_grad_() for x in qkv]
        keywords = {**options, **schedule_options}
        if "sinks" in options:
            leaves.append(torch.tensor(options["sinks"], dtype=torch.float64, requires_grad=True))
            keywords["sinks"] = leaves[3]
        result = attend(
            *leaves[:3],
            S2(4, 2, 3),
            *layout_and_group,
            documents=document_ids(DOCUMENTS["packed"]),
            return_lse=has_lse,
            **keywords,
        )
        outs = result if has_lse else (result,)
        return [x.detach() for x in outs], torch.autograd.grad(outs, leaves, upstream[: len(outs)])

    def work(rank, group):
        local_qkv = [layout.shard(x, rank) for x in inputs]
        local_upstream = [layout.shard(x, rank) for x in upstream]
        return run(parallel.attend, local_qkv, (layout, group), local_upstream, schedule=schedule)

    outs_by_rank, grads_by_rank = zip(*threads(layout.ranks, work), strict=True)
    expected_outs, expected_grads = run(attention.attend, inputs, (), upstream)

    results = [layout.unshard(list(shards)) for shards in zip(*outs_by_rank, strict=True)]
    results += [layout.unshard([grads[n] for grads in grads_by_rank]) for n in range(3)]
    assert max_error(results, [*expected_outs, *expected_grads[:3]]) < 1e-10
    if "sinks" in options:
        sinks_grad = sum(grads[3] for grads in grads_by_rank)
        assert max_error([sinks_grad], expected_grads[3:]) < 1e-10


@pytest.mark.parametrize("schedule", ["ring", "heads", "heads 2 x ring"])
def test_only_some_ranks_may_use_the_lse_in_their_loss(threads, schedule):
    """Backward has the same collectives on every rank."""
    layout = Layout.zigzag(LENGTH, 4)
    inputs, _ = make_inputs()

    def gradients(attend, qkv, layout_and_group, lse_weight, **options):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out, lse = attend(*leaves, S2(4, 2, 3), *layout_and_group, return_lse=True, **options)
        loss = out.square().sum()
        if lse_weight is not None:
            loss = loss + (lse * lse_weight).sum()
        return torch.autograd.grad(loss, leaves)

    def work(rank, group):
        local_qkv = [layout.shard(x, rank) for x in inputs]
        lse_weight = 1.0 if rank == 1 else None
        return gradients(parallel.attend, local_qkv, (layout, group), lse_weight, schedule=schedule)

    ours = [layout.unshard(list(shards)) for shards in zip(*threads(4, work), strict=True)]
    lse_weights = torch.zeros(1, LENGTH, 1, dtype=torch.float64)
    lse_weights[:, layout.tokens(1)] = 1.0
    assert max_error(ours, gradients(attention.attend, inputs, (), lse_weights)) < 1e-10


@pytest.mark.parametrize("schedule", ["ring", "gather", "stripes", "heads", "heads 2 x stripes"])
def test_reruns_are_bitwise_equal(threads, schedule):
    runs = [
        attend_over_ranks(
            threads, Layout.zigzag(LENGTH, 4), S2(4, 2, 3), schedule, DOCUMENTS["packed"]
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "schedule", ["ring", "gather", "stripes", "heads", "heads 2 x ring", "heads 2 x stripes"]
)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("layout", ["zigzag-4", "uneven", "contiguous-4-blocks"])
def test_measured_traffic_equals_the_plans(threads, monkeypatch, schedule, documents, layout):
    layout = LAYOUTS[layout]
    pattern = S2(4, 2, 3)
    documents = DOCUMENTS[documents]
    sent = Counter()
    received = Counter()
    real_all_to_all = dist.all_to_all_single
    real_all_gather = dist.all_gather_into_tensor

    def elements_per_row(x):
        return x[0].numel() if x.ndim > 1 and len(x) else 1

    def all_to_all(output, x, output_split_sizes, input_split_sizes, group=None, **options):
        rank = group.rank()
        rows_sent = sum(input_split_sizes) - input_split_sizes[rank]
        rows_received = sum(output_split_sizes) - output_split_sizes[rank]
        sent[dist.get_rank()] += rows_sent * elements_per_row(x)
        received[dist.get_rank()] += rows_received * elements_per_row(output)
        return real_all_to_all(
            output, x, output_split_sizes, input_split_sizes, group=group, **options
        )

    def all_gather(output, x, group=None, **options):
        if x.dtype != torch.int64:  # the plans' keys
            received[dist.get_rank()] += output.numel() - x.numel()
            sent[dist.get_rank()] += output.numel() - x.numel()
        return real_all_gather(output, x, group=group, **options)

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(dist, "all_gather_into_tensor", all_gather)
    attend_over_ranks(threads, layout, pattern, schedule, documents)
    (chosen,) = schedules_named(schedule, layout.ranks)
    rows = batch_rows(document_ids(documents), 2, layout.length)

    for rank in range(layout.ranks):
        traffic = plan_attention(layout, pattern, 4, 2, rows, chosen, rank).traffic(8, 8)
        assert (sent[rank], received[rank]) == tuple(map(sum, zip(*traffic, strict=True))), rank


@pytest.mark.parametrize("change", ["pattern", "schedule", "rows", "documents"])
def test_ranks_with_different_plans_raise_instead_of_hanging(threads, change):
    layout = Layout.zigzag(LENGTH, 4)
    inputs, _ = make_inputs()
    changed_schedules = {"schedule": "gather", "rows": "heads 2 x ring"}

    def work(rank, group):
        differs = rank == 2
        pattern = Window(9) if differs and change == "pattern" else Window(8)
        documents = DOCUMENTS["packed" if differs and change == "documents" else "tiny"]
        schedule = changed_schedules.get(change, "ring") if differs else "ring"
        local_qkv = [layout.shard(x, rank) for x in inputs]
        with pytest.raises(
            RuntimeError, match="rank 2 of the group is about to do something different from rank 0"
        ):
            parallel.attend(
                *local_qkv,
                pattern,
                layout,
                group,
                documents=document_ids(documents),
                schedule=schedule,
            )

    threads(4, work)


def test_a_stripe_offset_by_one_fails_the_comparison(threads, monkeypatch):
    from longspan.parallel.schedules import near_far

    real = near_far.far_key_ranges

    def offset_by_one(documents, rules):
        return real(
            documents,
            tuple(replace(rule, residue=(rule.residue + 1) % rule.step) for rule in rules),
        )

    monkeypatch.setattr(near_far, "far_key_ranges", offset_by_one)
    assert attend_error(threads, Layout.zigzag(LENGTH, 2), S2(4, 2, 3), "stripes") > 1e-3


def test_a_halo_one_token_too_short_fails_the_comparison(threads, monkeypatch):
    from longspan.parallel.schedules.near_far import NearFarRules

    real = NearFarRules.halo

    def one_token_too_short(rules, rows, start, *rest):
        return real(rules, rows, start, *rest).clip(0, start - 1)

    monkeypatch.setattr(NearFarRules, "halo", one_token_too_short)
    assert attend_error(threads, Layout.zigzag(LENGTH, 2), Window(7), "stripes") > 1e-3


def test_swapped_segments_fail_the_comparison(threads):
    swapped = Layout((((0, 13), (26, 39)), ((13, 26), (39, 52))))
    inputs, upstream = make_inputs()
    for schedule in ("ring", "stripes", "heads"):

        def operation(q, k, v, layout, group, schedule=schedule):
            return parallel.attend(q, k, v, S2(4, 2, 3), layout, group, schedule=schedule)

        ours = over_ranks(
            threads, LAYOUTS["zigzag-2"], operation, inputs, upstream, mutated=swapped
        )
        assert max_error(ours, attend_on_one_device(S2(4, 2, 3), None)) > 1e-3


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
def test_unsupported_schedules_are_refused_with_a_reason(
    threads, schedule, heads, kv_heads, message
):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        attend_over_ranks(
            threads,
            Layout.zigzag(LENGTH, 4),
            Causal(),
            schedule,
            None,
            heads=heads,
            kv_heads=kv_heads,
        )


def test_moba_does_not_support_the_heads_schedule(threads):
    with pytest.raises(ValueError, match=r"blocks that are chosen from the content .* use ring"):
        attend_over_ranks(threads, Layout.zigzag(LENGTH, 2, 4), attention.MoBA(4, 3), "heads", None)


# The papers' size: 1M tokens, 32 query and 8 KV heads of 128 dims, S2 with a local band of 8K.
MILLION = 1 << 20
MIB = 1 << 20
MILLION_S2 = S2(64, 128, 16).spread(8)


def received_mib(ranks, schedule, sampled_ranks, pattern=MILLION_S2):
    """Return the most that one of these ranks receives in forward, in bf16."""
    layout = Layout.zigzag(MILLION, ranks, 64)
    rows = (BatchRows(0, 1, (0,), MILLION),)
    plans = [plan_attention(layout, pattern, 32, 8, rows, schedule, rank) for rank in sampled_ranks]
    return max(plan.traffic(128, 128)[0].received * 2 / MIB for plan in plans)


def needed_mib(ranks, sampled_ranks):
    """Return the most that one of these ranks needs: the blocks its queries see on other ranks."""
    layout = Layout.zigzag(MILLION, ranks, 64)
    most_mib = 0
    for rank in sampled_ranks:
        num_blocks = 0
        for head in range(8):
            needed = np.zeros(MILLION // 64, bool)
            for start, stop in layout.segments[rank]:
                for blocks in MILLION_S2.need(start, stop, head):
                    assert blocks.size == 64
                    needed[blocks.start + blocks.step * np.arange(blocks.count)] = True
            # The rank has the blocks of its own segments already.
            for start, stop in layout.segments[rank]:
                needed[start // 64 : -(-stop // 64)] = False
            num_blocks += int(needed.sum())
        most_mib = max(most_mib, num_blocks * 64 * 256 * 2 / MIB)
    return most_mib


@pytest.mark.parametrize("ranks", [8, 12, 64, 96, 1000, 1024, 4096])
def test_stripes_move_hardly_more_than_the_keys_needed(ranks):
    # The rank that needs most is among those whose band no longer reaches the sequence's start.
    edge = 8192 * 2 * ranks // MILLION
    sampled_ranks = sorted(
        {min(ranks - 1, rank) for rank in (0, 1, edge, edge + 1, edge + 2, ranks // 2, ranks - 1)}
    )
    is_power_of_two = ranks & (ranks - 1) == 0
    moved = received_mib(ranks, Schedule("stripes"), sampled_ranks)
    assert moved <= (1.10 if is_power_of_two else 1.15) * needed_mib(ranks, sampled_ranks)
    if ranks == 64:
        assert moved < 0.1 * received_mib(64, Schedule("ring"), [0])
    if ranks > 80 and ranks % 8 == 0:
        assert received_mib(ranks, Schedule("stripes", 8), sampled_ranks) < moved
    if ranks < 100:
        layout = Layout.zigzag(MILLION, ranks, 64)
        chosen = choose_schedule("auto", layout, MILLION_S2, 32, 8, (128, 128))
        assert chosen.kv_schedule == "stripes"


@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("schedule", ["ring", "gather", "stripes", "heads 2 x stripes"])
def test_gpu_kernels_support_the_tiles_of_plans(backend, schedule):
    """Only blocks of stripes may stand at equal distances, wherever documents begin.

    Flash needs consecutive positions, and so do lists of blocks, whose pattern is None here.
    """
    layout = Layout.zigzag(1024, 4)
    (chosen,) = schedules_named(schedule, 4)
    if backend == "flash":
        patterns = (Causal(), Window(300))
    else:
        patterns = (Causal(), S2(64, 2, 4), S2(64, 2, 8, near=(4, 2)), None)

    for pattern in patterns:
        if pattern is None and chosen.kv_schedule == "stripes":
            continue
        allowed_sizes = set() if backend == "flash" or pattern is None else {64}
        for starts, rank in itertools.product(((0,), (0, 100, 192, 700)), range(4)):
            rows = (BatchRows(0, 1, starts, 1024),)
            plan = plan_attention(layout, pattern, 4, 2, rows, chosen, rank)
            for job in [job for stage in plan.stages for job in stage.jobs]:
                sizes_of_spaced_blocks = {
                    blocks.size for blocks in (job.q_positions, job.k_positions) if blocks.step > 1
                }
                assert sizes_of_spaced_blocks <= allowed_sizes


@pytest.mark.parametrize("schedule", ["ring", "gather", "stripes", "heads 2 x stripes"])
@pytest.mark.parametrize("layout", [Layout.zigzag(1024, 4), Layout.contiguous(1024, 4)], ids=repr)
def test_tiles_that_are_computed_together_share_no_tokens(layout, schedule):
    """No token is a query, or a key, twice in a group, and groups keep the order of tiles.

    They are as few for many documents as for one, but for those at the edges of segments.
    """
    (chosen,) = schedules_named(schedule, 4)
    for pattern, rank in itertools.product((Causal(), S2(64, 2, 4)), range(4)):
        num_groups = []
        for starts in ((0,), tuple(range(0, 1024, 8))):
            rows = (BatchRows(0, 1, starts, 1024), BatchRows(1, 3, (0,), 1024))
            plan = plan_attention(layout, pattern, 4, 2, rows, chosen, rank)
            num_groups.append(sum(len(stage.groups) for stage in plan.stages))
            for stage in plan.stages:
                assert_groups(stage)
        assert num_groups[1] <= num_groups[0]


def assert_groups(stage):
    jobs_of_groups = [group.tiles.places for group in stage.groups]
    number_of_group = {
        id(job): number for number, jobs in enumerate(jobs_of_groups) for job in jobs
    }
    assert sorted(number_of_group) == sorted(map(id, stage.jobs))
    assert sum(map(len, jobs_of_groups)) == len(stage.jobs)
    for jobs in jobs_of_groups:
        for tokens in ("query_slots", "key_columns"):
            places = [
                (row, token)
                for job in jobs
                for row in range(job.batch.start, job.batch.stop)
                for token in range(getattr(job, tokens).start, getattr(job, tokens).stop)
            ]
            assert len(set(places)) == len(places)
    # The tiles of a query are in the order of the jobs.
    for earlier, later in itertools.combinations(stage.jobs, 2):
        same_queries = (earlier.batch, earlier.query_slots) == (later.batch, later.query_slots)
        if same_queries and earlier.kv_heads == later.kv_heads:
            assert number_of_group[id(earlier)] < number_of_group[id(later)]


def test_every_schedule_works_on_one_rank(threads):
    for schedule in ("grid", "heads", "heads 2 x ring", "stripes"):
        assert attend_error(threads, Layout.zigzag(LENGTH, 1), S2(4, 2, 3), schedule) < 1e-10


def test_a_ring_moves_only_the_visible_keys():
    """Dense causal: keys after all queries are not sent, and no key is sent twice."""
    layout = Layout.contiguous(64, 4)
    rows = (BatchRows(0, 1, (0,), 64),)
    for rank in range(4):
        forward, _ = plan_attention(layout, Causal(), 1, 1, rows, Schedule("ring"), rank).traffic(
            1, 1
        )
        assert forward.received == 2 * 16 * rank
    window = plan_attention(layout, Window(5), 1, 1, rows, Schedule("ring"), 3).traffic(1, 1)[0]
    assert window.received == 2 * 4
