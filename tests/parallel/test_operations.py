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
# Lengths of each row's documents. They begin inside shards, at shards' edges (13, 26 and 39, for
# contiguous and zigzag on four ranks) and span several shards.
DOCUMENTS = {
    "one": None,
    "packed": [[5, 8, 13, 1, 20, 5], [26, 13, 13]],
    "tiny": [[1] * 52, [2] * 26],
}


def document_ids(documents):
    """Return int32 ``[batch, time]`` from the lengths of each row's documents."""
    if documents is None:
        return None
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents]
    ).int()


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def over_ranks(threads, layout, operation, inputs, upstream, mutated=None):
    """Return output and gradients of ``operation(*inputs, layout, group)``, of the whole sequence.

    Args:
        mutated: A wrong layout to hand to the operation.
    """

    def work(rank, group):
        local_inputs = [layout.shard(x, rank).requires_grad_() for x in inputs]
        out = operation(*local_inputs, mutated or layout, group)
        local_upstream = layout.shard(upstream, rank)
        return out.detach(), *torch.autograd.grad(out, local_inputs, local_upstream)

    results_by_rank = threads(layout.ranks, work)
    return [layout.unshard(list(shards)) for shards in zip(*results_by_rank, strict=True)]


def on_one_device(operation, inputs, upstream):
    """Return output and gradients of ``operation(*inputs)``."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = operation(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def max_error(ours, expected):
    """Return the largest relative error in norm; it is NaN if any value is."""
    errors = [(a - b).norm() / b.norm().clamp(min=1) for a, b in zip(ours, expected, strict=True)]
    return float(torch.stack(errors).double().max())


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
    expected = on_one_device(
        lambda *x: attention.attend(
            *x, pattern, documents=document_ids(documents), backend=reference
        ),
        inputs,
        upstream,
    )

    def operation(q, k, v, layout, group):
        return parallel.attend(
            q, k, v, pattern, layout, group, documents=document_ids(documents), schedule="gather"
        )

    return max_error(over_ranks(threads, layout, operation, inputs, upstream, **mutation), expected)


# The shape of the log-decay without its batch, and whether the family has a beta (delta rule).
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
    decay_shape, has_beta = FAMILIES[family]
    inputs = draw(
        3,
        (LENGTH, key_heads, 8),
        (LENGTH, key_heads, 8),
        (LENGTH, 3, 5),
        (LENGTH, 3, 8),
        (LENGTH, 3),
    )
    inputs[1] = torch.nn.functional.normalize(inputs[1], dim=-1)
    inputs[3] = -0.05 * inputs[3].square()  # a log-decay for each token and key dim
    inputs[4] = inputs[4].sigmoid()  # beta
    (upstream,) = draw(1, (LENGTH, 3, 5))
    constant_decay = torch.tensor(decay, dtype=torch.float64)

    # Decays per token and beta are inputs with gradients where the family has them.
    decay_per_token = decay_shape is not None and len(decay_shape) > 1
    differentiable = inputs[:3]
    if decay_per_token:
        differentiable.append(inputs[3])
    if has_beta:
        differentiable.append(inputs[4])

    def options(gates):
        """Return the keyword arguments that follow from the inputs after q, k and v."""
        gates = list(gates)
        beta = gates.pop() if has_beta else None
        if decay_shape is None:
            decay = None
        elif not decay_per_token:
            decay = constant_decay
        elif len(decay_shape) == 2:
            decay = gates[0][..., 0]
        else:
            decay = gates[0]
        return {"decay": decay, "beta": beta, "scale": 0.3, "documents": document_ids(documents)}

    def reference(q, k, v, *gates):
        return attention.linear_attention(q, k, v, backend="reference", **options(gates))

    def operation(q, k, v, *rest):
        *gates, layout, group = rest
        return parallel.linear_attention(
            q, k, v, layout, group, schedule=schedule, **options(gates)
        )

    return max_error(
        over_ranks(threads, layout, operation, differentiable, upstream, **mutation),
        on_one_device(reference, differentiable, upstream),
    )


def convolution_errors(threads, layout, documents, width=4, **mutation):
    inputs = draw(3, (LENGTH, 6))
    (upstream,) = draw(1, (LENGTH, 6))
    weight, bias = (x[0] for x in draw(5, (6, width), (6,)))
    documents = document_ids(documents)
    expected = on_one_device(
        lambda x: attention.short_convolution(x, weight, bias, documents=documents),
        inputs,
        upstream,
    )

    def operation(x, layout, group):
        return parallel.short_convolution(x, weight, bias, layout, group, documents=documents)

    return max_error(over_ranks(threads, layout, operation, inputs, upstream, **mutation), expected)


@pytest.mark.parametrize(
    "layout",
    [Layout.contiguous(LENGTH, 3, 4), Layout.zigzag(LENGTH, 4, 4)],
    ids=["contiguous", "zigzag"],
)
@pytest.mark.parametrize("documents", [None, [[8, 20, 4, 20]] * 2], ids=["one", "packed"])
def test_moba_matches_one_device(threads, layout, documents):
    assert (
        softmax_errors(threads, layout, attention.MoBA(4, 3), documents, reference="torch") < 1e-10
    )


def test_moba_blocks_split_between_ranks_are_refused(threads):
    with pytest.raises(
        ValueError, match="layout must have its edges at multiples of the pattern's block 8"
    ):
        softmax_errors(threads, LAYOUTS["zigzag-4"], attention.MoBA(8, 3), None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "value_dim"), [(1, 1, 8), (6, 3, 4), (4, 1, 16), (3, 3, 8)]
)
def test_head_ratios_and_value_dims(threads, heads, kv_heads, value_dim):
    layout = LAYOUTS["uneven"]
    documents = DOCUMENTS["packed"]
    assert (
        softmax_errors(threads, layout, S2(8, 1, 2), documents, heads, kv_heads, value_dim) < 1e-10
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_linear_attention_matches_one_device(threads, layout, documents):
    assert linear_errors(threads, layout, documents) < 1e-10


SCAN_LAYOUTS = [
    LAYOUTS[name]
    for name in ("contiguous-2", "zigzag-2", "zigzag-3", "zigzag-4-one-without", "uneven")
]
SCAN_LAYOUTS += [Layout.zigzag(LENGTH, 8, 2), Layout.striped(LENGTH, 3, 4)]


@pytest.mark.parametrize("layout", SCAN_LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("family", ["constant", "vector", "gated delta"])
def test_linear_attention_by_scan_matches_one_device(threads, layout, documents, family):
    assert linear_errors(threads, layout, documents, family=family, schedule="scan") < 1e-10


def test_linear_attention_with_strong_decay(threads):
    assert linear_errors(threads, LAYOUTS["zigzag-3"], None, decay=(-2.0, -120.0, -1e-5)) < 1e-10


@pytest.mark.parametrize(
    "layout", [LAYOUTS[name] for name in ("zigzag-3", "zigzag-4-one-without", "uneven")]
)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "constant"])
def test_every_family_of_linear_attention_matches_one_device(threads, layout, documents, family):
    key_heads = 1 if family == "gated delta" else 3
    assert linear_errors(threads, layout, documents, family=family, key_heads=key_heads) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("width", [1, 4])
def test_short_convolution_matches_one_device(threads, layout, documents, width):
    assert convolution_errors(threads, layout, documents, width) < 1e-10


def test_a_halo_one_token_too_short_fails_the_comparison(threads, monkeypatch):
    from longspan.parallel import convolution

    real = convolution._pad_front
    monkeypatch.setattr(convolution, "_pad_front", lambda x, length: real(x[:, 1:], length))
    assert convolution_errors(threads, LAYOUTS["zigzag-2"], None) > 1e-3


@pytest.mark.parametrize("schedule", ["gather", "scan"])
@pytest.mark.parametrize(
    "layout", [LAYOUTS[name] for name in ("contiguous-1", "zigzag-3", "uneven")]
)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_initial_and_final_states_match_one_device(threads, layout, documents, schedule):
    """Every rank has a copy of both states and a loss of its own; their gradients are summed."""
    q, k, v = draw(3, (LENGTH, 3, 8), (LENGTH, 3, 8), (LENGTH, 3, 5))
    initial_state, state_upstream = draw(7, (3, 8, 5), (3, 8, 5))
    (upstream,) = draw(8, (LENGTH, 3, 5))
    options = {
        "decay": torch.tensor([0.0, -0.02, -0.7], dtype=torch.float64),
        "return_state": True,
        "documents": document_ids(documents),
    }
    leaves = [x.clone().requires_grad_() for x in (q, k, v, initial_state)]
    out, final_state = attention.linear_attention(*leaves[:3], state=leaves[3], **options)
    expected_grads = torch.autograd.grad((out, final_state), leaves, (upstream, state_upstream))

    def work(rank, group):
        local_inputs = [layout.shard(x, rank).requires_grad_() for x in (q, k, v)]
        state = initial_state.clone().requires_grad_()
        local_out, our_final_state = parallel.linear_attention(
            *local_inputs, layout, group, state=state, schedule=schedule, **options
        )
        gradients = torch.autograd.grad(
            (local_out, our_final_state),
            [*local_inputs, state],
            (layout.shard(upstream, rank), state_upstream / layout.ranks),
        )
        return our_final_state.detach(), *gradients

    final_states, *qkv_grads, state_grads = zip(*threads(layout.ranks, work), strict=True)
    assert max_error(final_states, [final_state.detach()] * layout.ranks) < 1e-10
    whole_qkv_grads = [layout.unshard(list(shards)) for shards in qkv_grads]
    assert max_error(whole_qkv_grads, expected_grads[:3]) < 1e-10
    assert max_error([sum(state_grads)], expected_grads[3:]) < 1e-10


def test_reruns_are_bitwise_equal(threads):
    inputs = draw(4, (LENGTH, 4, 8), (LENGTH, 2, 8), (LENGTH, 2, 8))
    (upstream,) = draw(1, (LENGTH, 4, 8))
    runs = [
        over_ranks(
            threads,
            LAYOUTS["zigzag-4"],
            lambda q, k, v, layout, group: parallel.attend(q, k, v, S2(4, 2, 3), layout, group),
            inputs,
            upstream,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# The zigzag layout on two ranks, with the second segments of the ranks exchanged.
SWAPPED_SEGMENTS = Layout((((0, 13), (26, 39)), ((13, 26), (39, 52))))


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_swapped_segments_fail_the_comparison(threads, documents):
    if documents is DOCUMENTS["tiny"]:  # no document spans two segments
        return
    assert (
        softmax_errors(threads, LAYOUTS["zigzag-2"], Causal(), documents, mutated=SWAPPED_SEGMENTS)
        > 1e-3
    )
    assert linear_errors(threads, LAYOUTS["zigzag-2"], documents, mutated=SWAPPED_SEGMENTS) > 1e-3


@pytest.mark.parametrize("family", ["constant", "gated delta"])
def test_an_extra_decay_of_the_state_fails_the_comparison(threads, monkeypatch, family):
    from longspan.parallel import linear

    real = linear.state_map

    def with_extra_decay(*arguments, **options):
        kept, added = real(*arguments, **options)
        return kept * 0.98, added

    monkeypatch.setattr(linear, "state_map", with_extra_decay)
    assert linear_errors(threads, LAYOUTS["zigzag-2"], None, family=family) > 1e-3


def test_gradients_not_returned_to_their_rank_fail_the_comparison(threads, monkeypatch):
    from longspan.parallel import collectives, softmax

    monkeypatch.setattr(softmax.GradientReturn, "add_to", lambda returned, total: None)
    assert softmax_errors(threads, LAYOUTS["zigzag-2"], Causal(), None) > 1e-3
    monkeypatch.setattr(
        collectives, "sum_in_rank_order", lambda values_by_rank, dtype: values_by_rank[0]
    )
    assert linear_errors(threads, LAYOUTS["zigzag-2"], None) > 1e-3


def test_bf16_is_close_to_fp64(threads):
    inputs = [x.bfloat16() for x in draw(4, (LENGTH, 4, 8), (LENGTH, 2, 8), (LENGTH, 2, 8))]
    upstream = draw(1, (LENGTH, 4, 8))[0].bfloat16()
    exact = on_one_device(
        lambda *x: attention.attend(*x, Causal()), [x.double() for x in inputs], upstream.double()
    )
    ours = over_ranks(
        threads,
        LAYOUTS["zigzag-4"],
        lambda q, k, v, layout, group: parallel.attend(q, k, v, Causal(), layout, group),
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
def test_errors_name_the_invalid_argument(threads, change, message):
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


def test_an_unknown_schedule_is_refused(threads):
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="schedule must be auto, gather or scan, got 'ring'"):
        threads(
            2,
            lambda rank, group: parallel.linear_attention(
                x, x, x, Layout.zigzag(8, 2), group, schedule="ring"
            ),
        )


def test_real_processes_match_one_device(ranks, tmp_path):
    import importlib.util
    from pathlib import Path

    script = Path(__file__).parent / "operations_worker.py"
    spec = importlib.util.spec_from_file_location("operations_worker", script)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    ranks(4, script, tmp_path / "out")
    results_by_rank = [torch.load(tmp_path / f"out-{rank}") for rank in range(4)]
    *inputs, upstream = worker.inputs()
    options = {"documents": worker.IDS, "backend": "reference"}
    expected = [
        on_one_device(lambda *x: attention.attend(*x, worker.PATTERN, **options), inputs, upstream),
        on_one_device(
            lambda *x: attention.linear_attention(*x, decay=worker.DECAY, **options),
            inputs,
            upstream,
        ),
        on_one_device(
            lambda q, k, v: attention.linear_attention(
                q, k * 0.3, v, beta=v.sigmoid()[..., 0], **options
            ),
            inputs,
            upstream,
        ),
    ]
    for operation_by_rank, oracle in zip(zip(*results_by_rank, strict=True), expected, strict=True):
        tensors = [
            worker.LAYOUT.unshard(list(shards)) for shards in zip(*operation_by_rank, strict=True)
        ]
        assert max_error(tensors, oracle) < 1e-10
