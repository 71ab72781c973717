"""The operations over ranks against one device: outputs and every gradient, in fp64."""

import pytest
import torch
from longspan import attention, parallel
from longspan.attention import S2, Causal
from longspan.parallel import Layout

LENGTH = 52
LAYOUTS = {
    "contiguous-1": Layout.contiguous(LENGTH, 1),
    "contiguous-2": Layout.contiguous(LENGTH, 2),
    "contiguous-4-blocks": Layout.contiguous(LENGTH, 4, 8),
    "zigzag-1": Layout.zigzag(LENGTH, 1),
    "zigzag-2": Layout.zigzag(LENGTH, 2),
    "zigzag-3": Layout.zigzag(LENGTH, 3),
    "zigzag-4": Layout.zigzag(LENGTH, 4),
    "zigzag-4-one-without": Layout.zigzag(LENGTH, 4, 13),
    "uneven": Layout((((0, 1), (40, 52)), (), ((1, 30),), ((30, 33), (33, 40)))),
}
# Inside shards, on their edges (13, 26, 39 of both kinds on four ranks) and across them, different
# for each row.
DOCUMENTS = {
    "one": None,
    "packed": [[5, 8, 13, 1, 20, 5], [26, 13, 13]],
    "tiny": [[1] * 52, [2] * 26],
}


def ids(documents):
    if documents is None:
        return None
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents]
    ).int()


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def over_ranks(threads, layout, operation, inputs, upstream, mutated=None):
    """Return output and gradients of ``operation(*inputs, layout, group)``, put together again."""

    def work(rank, group):
        own = [layout.shard(x, rank).requires_grad_() for x in inputs]
        out = operation(*own, mutated or layout, group)
        return out.detach(), *torch.autograd.grad(out, own, layout.shard(upstream, rank))

    return [layout.unshard(list(parts)) for parts in zip(*threads(layout.ranks, work), strict=True)]


def on_one(operation, inputs, upstream):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = operation(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def worst(ours, expected):
    errors = [(a - b).norm() / b.norm().clamp(min=1) for a, b in zip(ours, expected, strict=True)]
    return float(torch.stack(errors).double().max())  # NaN, if there is any


def softmax_errors(
    threads,
    layout,
    pattern,
    documents,
    heads=4,
    kv_heads=2,
    value_dim=8,
    reference="reference",
    **mutation,
):
    inputs = draw(heads, (LENGTH, heads, 8), (LENGTH, kv_heads, 8), (LENGTH, kv_heads, value_dim))
    inputs[0] *= 5  # peaked
    (upstream,) = draw(1, (LENGTH, heads, value_dim))
    expected = on_one(
        lambda *x: attention.attend(*x, pattern, documents=ids(documents), backend=reference),
        inputs,
        upstream,
    )

    def operation(q, k, v, layout, group):
        return parallel.attend(
            q, k, v, pattern, layout, group, documents=ids(documents), schedule="gather"
        )

    return worst(over_ranks(threads, layout, operation, inputs, upstream, **mutation), expected)


FAMILIES = {
    "constant": ((3,), False),
    "scalar": ((LENGTH, 3), False),
    "vector": ((LENGTH, 3, 8), False),
    "delta": (None, True),
    "gated delta": ((LENGTH, 3), True),
    "gated delta by key": ((LENGTH, 3, 8), True),
}


def linear_errors(
    threads,
    layout,
    documents,
    decay=(0.0, -0.02, -0.7),
    family="constant",
    key_heads=3,
    schedule="gather",
    **mutation,
):
    shape, delta = FAMILIES[family]
    inputs = draw(
        3,
        (LENGTH, key_heads, 8),
        (LENGTH, key_heads, 8),
        (LENGTH, 3, 5),
        (LENGTH, 3, 8),
        (LENGTH, 3),
    )
    inputs[1] = torch.nn.functional.normalize(inputs[1], dim=-1)
    inputs[3], inputs[4] = -0.05 * inputs[3].square(), inputs[4].sigmoid()
    (upstream,), fixed = draw(1, (LENGTH, 3, 5)), torch.tensor(decay, dtype=torch.float64)
    options = {"scale": 0.3, "documents": ids(documents)}

    def arguments(decay, beta):
        by_rank = {1: fixed, 2: None if decay is None else decay[..., 0], 3: decay}
        return {
            "decay": by_rank[len(shape)] if shape else None,
            "beta": beta if delta else None,
            **options,
        }

    used = (
        inputs[: 5 if delta else 4]
        if shape and len(shape) > 1
        else [*inputs[:3], *([inputs[4]] if delta else [])]
    )

    def split(x):
        *qkv, rest = x[:3], list(x[3:])
        beta = rest.pop() if delta else None
        return qkv[0], arguments(rest[0] if rest else None, beta)

    def alone(*x):
        qkv, own = split(x)
        return attention.linear_attention(*qkv, backend="reference", **own)

    def operation(*x):
        qkv, own = split(x[:-2])
        return parallel.linear_attention(*qkv, *x[-2:], schedule=schedule, **own)

    return worst(
        over_ranks(threads, layout, operation, used, upstream, **mutation),
        on_one(alone, used, upstream),
    )


def convolution_errors(threads, layout, documents, width=4, **mutation):
    inputs, (upstream,) = draw(3, (LENGTH, 6)), draw(1, (LENGTH, 6))
    weight, bias = (x[0] for x in draw(5, (6, width), (6,)))
    documents = ids(documents)
    expected = on_one(
        lambda x: attention.short_convolution(x, weight, bias, documents=documents),
        inputs,
        upstream,
    )

    def operation(x, layout, group):
        return parallel.short_convolution(x, weight, bias, layout, group, documents=documents)

    return worst(over_ranks(threads, layout, operation, inputs, upstream, **mutation), expected)


@pytest.mark.parametrize(
    "layout",
    [Layout.contiguous(LENGTH, 3, 4), Layout.zigzag(LENGTH, 4, 4)],
    ids=["contiguous", "zigzag"],
)
@pytest.mark.parametrize("documents", [None, [[8, 20, 4, 20]] * 2], ids=["one", "packed"])
def test_chosen_blocks_are_those_of_one_device(threads, layout, documents):
    assert (
        softmax_errors(threads, layout, attention.MoBA(4, 3), documents, reference="torch") < 1e-10
    )


def test_blocks_that_ranks_share_are_refused(threads):
    with pytest.raises(
        ValueError, match="layout must have its edges at multiples of the pattern's block 8"
    ):
        softmax_errors(threads, LAYOUTS["zigzag-4"], attention.MoBA(8, 3), None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "value_dim"), [(1, 1, 8), (6, 3, 4), (4, 1, 16), (3, 3, 8)]
)
def test_head_ratios_and_value_dims(threads, heads, kv_heads, value_dim):
    layout, documents = LAYOUTS["uneven"], DOCUMENTS["packed"]
    assert (
        softmax_errors(threads, layout, S2(8, 1, 2), documents, heads, kv_heads, value_dim) < 1e-10
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_linear_attention_is_that_of_one_device(threads, layout, documents):
    assert linear_errors(threads, layout, documents) < 1e-10


SCANNED = [
    LAYOUTS[name]
    for name in ("contiguous-2", "zigzag-2", "zigzag-3", "zigzag-4-one-without", "uneven")
]
SCANNED += [Layout.zigzag(LENGTH, 8, 2), Layout.striped(LENGTH, 3, 4)]


@pytest.mark.parametrize("layout", SCANNED)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("family", ["constant", "vector", "gated delta"])
def test_a_scan_gives_the_same(threads, layout, documents, family):
    assert linear_errors(threads, layout, documents, family=family, schedule="scan") < 1e-10


def test_linear_attention_with_strong_decay(threads):
    assert linear_errors(threads, LAYOUTS["zigzag-3"], None, decay=(-2.0, -120.0, -1e-5)) < 1e-10


@pytest.mark.parametrize(
    "layout", [LAYOUTS[name] for name in ("zigzag-3", "zigzag-4-one-without", "uneven")]
)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "constant"])
def test_every_family_of_linear_attention(threads, layout, documents, family):
    assert (
        linear_errors(
            threads, layout, documents, family=family, key_heads=1 if family == "gated delta" else 3
        )
        < 1e-10
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("width", [1, 4])
def test_short_convolutions_are_those_of_one_device(threads, layout, documents, width):
    assert convolution_errors(threads, layout, documents, width) < 1e-10


def test_a_halo_one_short_is_caught(threads, monkeypatch):
    from longspan.parallel import convolution

    real = convolution._pad_front
    monkeypatch.setattr(convolution, "_pad_front", lambda x, rows: real(x[:, 1:], rows))
    assert convolution_errors(threads, LAYOUTS["zigzag-2"], None) > 1e-3


@pytest.mark.parametrize("schedule", ["gather", "scan"])
@pytest.mark.parametrize(
    "layout", [LAYOUTS[name] for name in ("contiguous-1", "zigzag-3", "uneven")]
)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_states_go_in_and_come_out(threads, layout, documents, schedule):
    """Every rank has a copy of the first and the last state, and its own loss; the sum counts."""
    q, k, v = draw(3, (LENGTH, 3, 8), (LENGTH, 3, 8), (LENGTH, 3, 5))
    (first, last_upstream), (upstream,) = draw(7, (3, 8, 5), (3, 8, 5)), draw(8, (LENGTH, 3, 5))
    options = {
        "decay": torch.tensor([0.0, -0.02, -0.7], dtype=torch.float64),
        "return_state": True,
        "documents": ids(documents),
    }
    leaves = [x.clone().requires_grad_() for x in (q, k, v, first)]
    out, last = attention.linear_attention(*leaves[:3], state=leaves[3], **options)
    expected = torch.autograd.grad((out, last), leaves, (upstream, last_upstream))

    def work(rank, group):
        own = [layout.shard(x, rank).requires_grad_() for x in (q, k, v)]
        state = first.clone().requires_grad_()
        ours, ours_last = parallel.linear_attention(
            *own, layout, group, state=state, schedule=schedule, **options
        )
        share = last_upstream / layout.ranks
        return ours_last.detach(), *torch.autograd.grad(
            (ours, ours_last), [*own, state], (layout.shard(upstream, rank), share)
        )

    lasts, *tokens, states = zip(*threads(layout.ranks, work), strict=True)
    assert worst(lasts, [last.detach()] * layout.ranks) < 1e-10
    assert worst([layout.unshard(list(parts)) for parts in tokens], expected[:3]) < 1e-10
    assert worst([sum(states)], expected[3:]) < 1e-10


def test_reruns_are_bitwise_equal(threads):
    inputs = draw(4, (LENGTH, 4, 8), (LENGTH, 2, 8), (LENGTH, 2, 8))
    (upstream,) = draw(1, (LENGTH, 4, 8))
    runs = [
        over_ranks(
            threads,
            LAYOUTS["zigzag-4"],
            lambda q, k, v, *at: parallel.attend(q, k, v, S2(4, 2, 3), *at),
            inputs,
            upstream,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


SWAPPED = Layout(
    (((0, 13), (26, 39)), ((13, 26), (39, 52)))
)  # the second halves of the zigzag on two ranks, exchanged


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_two_segments_swapped_are_caught(threads, documents):
    if documents is DOCUMENTS["tiny"]:  # no segment has anything to do with another
        return
    assert softmax_errors(threads, LAYOUTS["zigzag-2"], Causal(), documents, mutated=SWAPPED) > 1e-3
    assert linear_errors(threads, LAYOUTS["zigzag-2"], documents, mutated=SWAPPED) > 1e-3


@pytest.mark.parametrize("family", ["constant", "gated delta"])
def test_a_state_decayed_once_too_often_is_caught(threads, monkeypatch, family):
    from longspan.parallel import linear

    real = linear.state_map

    def mutant(*arguments, **options):
        kept, added = real(*arguments, **options)
        return kept * 0.98, added

    monkeypatch.setattr(linear, "state_map", mutant)
    assert linear_errors(threads, LAYOUTS["zigzag-2"], None, family=family) > 1e-3


def test_gradients_that_stay_abroad_are_caught(threads, monkeypatch):
    from longspan.parallel import collectives, softmax

    monkeypatch.setattr(softmax.GradientReturn, "add_to", lambda parcel, total: None)
    assert softmax_errors(threads, LAYOUTS["zigzag-2"], Causal(), None) > 1e-3
    monkeypatch.setattr(collectives, "sum_in_rank_order", lambda of_ranks, dtype: of_ranks[0])
    assert linear_errors(threads, LAYOUTS["zigzag-2"], None) > 1e-3


def test_bf16_stays_close(threads):
    inputs = [x.bfloat16() for x in draw(4, (LENGTH, 4, 8), (LENGTH, 2, 8), (LENGTH, 2, 8))]
    upstream = draw(1, (LENGTH, 4, 8))[0].bfloat16()
    exact = on_one(
        lambda *x: attention.attend(*x, Causal()), [x.double() for x in inputs], upstream.double()
    )
    ours = over_ranks(
        threads,
        LAYOUTS["zigzag-4"],
        lambda q, k, v, *at: parallel.attend(q, k, v, Causal(), *at),
        inputs,
        upstream,
    )
    assert {x.dtype for x in ours} == {torch.bfloat16}
    assert all((a - b).norm() / b.norm() < 2e-2 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": Layout.zigzag(8, 3)}, "layout is over 3 ranks, but group has 2"),
        ({"layout": Layout.contiguous(10, 2)}, "layout gives rank . 5 tokens, but it has 4"),
        (
            {"documents": torch.zeros(1, 4).int()},
            r"documents must be integers of shape \(1, 8\), got int32 of shape \(1, 4\)",
        ),
        ({"documents": torch.tensor([[0, 1, 0, 1, 1, 1, 1, 1]])}, "must not decrease"),
        ({"backend": "cuda"}, "backend must be auto"),
    ],
)
def test_bad_arguments_are_named(threads, change, message):
    arguments = (
        {name: torch.zeros(1, 4, 2, 8) for name in "qkv"} | {"layout": Layout.zigzag(8, 2)} | change
    )

    def softmax(rank, group):
        parallel.attend(**arguments, pattern=Causal(), group=group)

    def linear(rank, group):
        parallel.linear_attention(**arguments, group=group)

    for operation in (softmax, linear):
        with pytest.raises(ValueError, match=message):
            threads(2, operation)


def test_an_unknown_schedule_is_named(threads):
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="schedule must be auto, gather or scan, got 'ring'"):
        threads(
            2,
            lambda rank, group: parallel.linear_attention(
                x, x, x, Layout.zigzag(8, 2), group, schedule="ring"
            ),
        )


def test_real_processes_give_the_same(ranks, tmp_path):
    import importlib.util
    from pathlib import Path

    script = Path(__file__).parent / "operations_worker.py"
    spec = importlib.util.spec_from_file_location("operations_worker", script)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    ranks(4, script, tmp_path / "out")
    parts = [torch.load(tmp_path / f"out-{rank}") for rank in range(4)]
    *whole, upstream = worker.inputs()
    options = {"documents": worker.IDS, "backend": "reference"}
    expected = [
        on_one(lambda *x: attention.attend(*x, worker.PATTERN, **options), whole, upstream),
        on_one(
            lambda *x: attention.linear_attention(*x, decay=worker.DECAY, **options),
            whole,
            upstream,
        ),
        on_one(
            lambda q, k, v: attention.linear_attention(
                q, k * 0.3, v, beta=v.sigmoid()[..., 0], **options
            ),
            whole,
            upstream,
        ),
    ]
    for ours, oracle in zip(zip(*parts, strict=True), expected, strict=True):
        assert (
            worst([worker.LAYOUT.unshard(list(part)) for part in zip(*ours, strict=True)], oracle)
            < 1e-10
        )
