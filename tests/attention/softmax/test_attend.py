from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from longspan.attention.softmax import pieces

from ..patterns.test_patterns import PATTERNS, patterns
from .oracle import document_ids, errors, make

DOCUMENTS = {"one": None, "edges": [17, 1, 24, 31], "aligned": [32, 8, 33], "tiny": [1] * 73}
LISTS = BlockLists.where(8, lambda i, j, h: (i * 7 + j * 3 + h) % 5 < 2, 400, num_kv_heads=2)


def compare(
    pattern,
    documents=None,
    heads=4,
    kv_heads=2,
    value_dim=None,
    backend="torch",
    length=73,
    dtype=torch.float64,
    **options,
):
    inputs = make(2, length, heads, kv_heads, 16, value_dim, dtype)
    ids = document_ids(documents)
    has_lse = options.get("sigmoid_bias") is None

    def run():
        result = attend(
            *inputs, pattern, documents=ids, backend=backend, return_lse=has_lse, **options
        )
        return result if has_lse else (result, None)

    return errors(run, inputs, pattern=pattern, documents=ids, **options)


SMALL_PIECES = {"_QUERY_BLOCK": 32, "_MIN_BAND_QUERIES": 4, "_NARROW_BAND": 12}


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut calls into such small pieces that a few hundred tokens reach every code path."""
    for name, value in SMALL_PIECES.items():
        monkeypatch.setattr(pieces, name, value)
    pieces._cached_mask.cache_clear()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize(
    "pattern",
    [Causal(), S2(8, 2, 3), S2(4, 1, 16, head_step=5), Window(9), Sinks(3) | Window(5), LISTS],
    ids=repr,
)
def test_parity_with_the_dense_formula(pattern, documents, backend):
    for name, error in compare(pattern, documents, backend=backend).items():
        assert error < 1e-10, name


@pytest.mark.parametrize(
    "length", [200, *(pytest.param(length, marks=pytest.mark.wide) for length in (5, 333))]
)
@pytest.mark.parametrize("pattern", [*PATTERNS, Window(40), LISTS], ids=repr)
def test_every_pattern_in_small_pieces(small_pieces, pattern, length):
    kv_heads = 4 if isinstance(pattern, PerHead) else 2
    for name, error in compare(pattern, length=length, heads=4, kv_heads=kv_heads).items():
        assert error < 1e-10, name


@pytest.mark.parametrize(
    ("heads", "kv_heads", "value_dim"), [(1, 1, 16), (6, 3, 8), (4, 1, 32), (3, 3, 16)]
)
def test_head_ratios_and_value_dims(small_pieces, heads, kv_heads, value_dim):
    for name, error in compare(
        S2(8, 2, 4) | Sinks(5), DOCUMENTS["edges"], heads, kv_heads, value_dim
    ).items():
        assert error < 1e-10, name


OPTIONS = {
    "scale": {"scale": 0.1},
    "sinks": {"sinks": torch.tensor([-1.0, 2.0, 9.0, 0.5], dtype=torch.float64).requires_grad_()},
    "softcap": {"softcap": 3.0},
    "sinks-softcap": {
        "sinks": torch.tensor([-1.0, 2.0, 9.0, 0.5], dtype=torch.float64).requires_grad_(),
        "softcap": 5.0,
    },
    "sigmoid": {"sigmoid_bias": -4.0},
    "sigmoid-softcap": {"sigmoid_bias": -1.0, "softcap": 4.0},
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("pattern", [Causal(), S2(8, 2, 3), Stripes(4, 5, 2), LISTS], ids=repr)
def test_options(small_pieces, pattern, options, backend):
    for name, error in compare(pattern, DOCUMENTS["aligned"], backend=backend, **options).items():
        assert error < 1e-10, name


@pytest.mark.parametrize("pattern", [Causal(), S2(8, 2, 3), LISTS], ids=repr)
def test_devices_without_the_fused_kernel(pattern, monkeypatch):
    monkeypatch.setattr("longspan.attention.softmax.piece_products._FUSED_KERNEL_DEVICES", set())
    monkeypatch.setattr("longspan.attention.softmax.piece_products._MAX_PAIRS", 100)
    for name, error in compare(pattern, DOCUMENTS["edges"], 6, 2, value_dim=8).items():
        assert error < 1e-10, name


@settings(max_examples=40, deadline=None)
@given(patterns(), st.integers(1, 150), st.sampled_from([1, 2]))
def test_random_patterns_and_lengths(pattern, length, group):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_PIECES.items():
            patch.setattr(pieces, name, value)
        for name, error in compare(pattern, length=length, heads=4 * group, kv_heads=4).items():
            assert error < 1e-10, name


class TestCasesThatDKernelGetsWrong:
    """In the original implementation, these gradients are NaN or those of another pattern."""

    @pytest.mark.parametrize(
        ("pattern", "length", "heads", "kv_heads"),
        [
            pytest.param(S2(8, 2, 4), 96, 8, 2, id="grouped queries"),
            pytest.param(
                BlockLists.where(8, lambda i, j, h: (i - j) % 3 == 0, 96),
                96,
                2,
                2,
                id="keys that come back",
            ),
            pytest.param(Dilated(8, 3, 9), 90, 2, 2, id="keys that come back, in closed form"),
            pytest.param(S2(8, 2, 64), 60, 2, 2, id="shorter than the stride"),
            pytest.param(S2(8, 2, 3), 91, 2, 2, id="no multiple of the block"),
            pytest.param(Stripes(8, 4, 1), 91, 2, 2, id="rows without keys"),
        ],
    )
    def test_gradients_are_right(self, pattern, length, heads, kv_heads):
        for name, error in compare(pattern, length=length, heads=heads, kv_heads=kv_heads).items():
            assert error < 1e-10, name


def shifted(rule):
    return replace(rule, residue=(rule.residue + 1) % rule.step)


def shortened_band(rule):
    return replace(rule, reach=rule.reach - 1) if rule.is_band and rule.reach else rule


@pytest.mark.parametrize("mutate", [shifted, shortened_band])
@pytest.mark.parametrize("pattern", [S2(4, 2, 5), S2(4, 2, 8, near=(5, 4))], ids=repr)
def test_a_stripe_off_by_one_and_a_band_too_short_fail_the_comparison(monkeypatch, pattern, mutate):
    real = S2.rules
    clean = compare(pattern)

    class Mutant(S2):
        def rules(self, head):
            return tuple(map(mutate, real(self, head)))

    mutant = Mutant(pattern.block, pattern.local_blocks, pattern.stride, near=pattern.near)
    inputs = make(2, 73, 4, 2, 16)
    wrong = errors(lambda: attend(*inputs, mutant, return_lse=True), inputs, pattern=pattern)
    assert max(clean.values()) < 1e-10
    assert min(wrong.values()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Causal(), S2(16, 2, 2), Window(33)], ids=repr)
def test_half_precision_is_close_to_fp64(dtype, pattern):
    inputs = make(1, 200, 4, 2, 32, dtype=torch.float32)
    narrow = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = attend(*narrow, pattern)
    assert out.dtype == dtype
    error_by_name = errors(
        lambda: attend(*narrow, pattern, return_lse=True), narrow, pattern=pattern
    )
    assert max(error_by_name.values()) < 2e-2


def test_sinks_of_minus_infinity_with_rows_that_see_nothing():
    sinks = torch.tensor(
        [-torch.inf, 1.0, -torch.inf, 0.0], dtype=torch.float64, requires_grad=True
    )
    q, k, v = make(1, 40, 4, 2, 8)
    out = attend(q, k, v, Stripes(8, 4, 1), sinks=sinks)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v, sinks))))


def packed(x):
    """Return ``x`` as one of three that are packed in the last dim: strides of 3."""
    return torch.stack([x, x + 1, x - 1], -1).unbind(-1)[0]


def permuted(*order):
    """Return a function that lays the memory of ``x`` out in another order of its dims."""
    inverse = [order.index(dim) for dim in range(4)]
    return lambda x: x.permute(order).contiguous().permute(inverse)


def overlapping(x):
    """Return a view whose tokens overlap, each beginning one number after the one before."""
    _, time, heads, dim = x.shape
    memory = x.flatten()[: time + heads * (dim + 4)].clone()
    return memory.as_strided(x.shape, (0, 1, dim + 4, 1))


LAYOUTS = {
    "packed": packed,
    "heads first": permuted(0, 2, 1, 3),
    "dims before time": permuted(0, 2, 3, 1),
    "dims first": permuted(3, 2, 1, 0),
    "same token": lambda x: x[:, :1].expand_as(x),
    "same head": lambda x: x[:, :, :1].expand_as(x),
    "same row": lambda x: x[:1].expand_as(x),
    "same number": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "overlapping": overlapping,
}


@pytest.mark.parametrize("documents", [None, DOCUMENTS["edges"]], ids=["one", "packed"])
@pytest.mark.parametrize("pattern", [Causal(), S2(8, 2, 3), LISTS], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, pattern, documents):
    """Of inputs and upstream gradients alike, as contiguous copies of them."""
    inputs = [x.detach() for x in make(2, 73, 4, 2, 16)]
    upstream = torch.randn(2, 73, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    ids = document_ids(documents)

    def run(backend, *tensors):
        *leaves, gradient = tensors
        leaves = [x.requires_grad_() for x in leaves]
        out = attend(*leaves, pattern, documents=ids, backend=backend)
        return out, *torch.autograd.grad(out, leaves, gradient)

    views = [layout(x) for x in (*inputs, upstream)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    ours = run("torch", *(x.detach() for x in views))
    for a, b in zip(ours, run("reference", *copies), strict=True):
        assert (a - b).norm() < 1e-10 * b.norm().clamp(1)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("sink", [None, 0.5, -torch.inf])
def test_upstream_nan_where_nothing_is_seen(backend, sink):
    """As ``logaddexp`` of log-sum-exps of minus infinity gives it: 0 there, finite elsewhere."""
    inputs = make(1, 40, 2, 1, 8)
    sinks = None if sink is None else torch.full((2,), sink, dtype=torch.float64)
    unseen = (attend(*inputs, Stripes(8, 4, 1), return_lse=True)[1] == -torch.inf)[0]
    upstream = torch.ones(1, 40, 2, 8, dtype=torch.float64)
    upstream_lse = torch.ones(1, 40, 2, dtype=torch.float64)

    def gradients(value):
        leaves = inputs if sinks is None else [*inputs, sinks.requires_grad_()]
        results = attend(*inputs, Stripes(8, 4, 1), return_lse=True, sinks=sinks, backend=backend)
        grad_out = upstream.masked_fill(unseen[..., None], value)
        # The sink's logit is the log-sum-exp of such a query, and has its gradient.
        grad_lse = upstream_lse.masked_fill(unseen, 0.0 if sink == 0.5 else value)
        return torch.autograd.grad(results, leaves, (grad_out, grad_lse))

    assert unseen.any()
    for found, expected in zip(gradients(torch.nan), gradients(0.0), strict=True):
        assert torch.equal(found, expected)
    assert not gradients(torch.nan)[0][0, unseen].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_upstream_nan_where_sigmoid_weights_have_nothing(backend):
    inputs = make(1, 40, 2, 1, 8)
    out = attend(*inputs, Stripes(8, 4, 1), sigmoid_bias=-1.0, backend=backend)
    gradients = torch.autograd.grad((out / out.norm(dim=-1, keepdim=True)).sum(), inputs)
    assert all(x.isfinite().all() for x in gradients)


def test_documents_changed_in_place_are_read_again():
    ids = torch.zeros(1, 64, dtype=torch.int32)
    q, k, v = make(1, 64, 2, 2, 8)
    attend(q, k, v, Causal(), documents=ids)
    ids.numpy()[:, 32:] = 1
    assert torch.equal(
        attend(q, k, v, Causal(), documents=ids)[:, 32:],
        attend(q[:, 32:], k[:, 32:], v[:, 32:], Causal()),
    )
    with torch.inference_mode():
        attend(q, k, v, Causal(), documents=torch.zeros(1, 64).int())


def test_fp32_is_precise():
    assert max(compare(S2(8, 2, 3), length=200, dtype=torch.float32).values()) < 1e-5


def test_reruns_are_bitwise_equal():
    q, k, v = make(1, 3000, 4, 2, 16, dtype=torch.float32)
    runs = []
    for _ in range(2):
        out = attend(q, k, v, S2(16, 4, 4) | Sinks(3))
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 3, 8)}, "2 heads, which do not divide the 3 heads"),
        ({"k": torch.zeros(1, 5, 2, 8)}, "shapes do not fit together"),
        ({"v": torch.zeros(1, 4, 2, 8, dtype=torch.float64)}, "v is torch.float64"),
        (
            {"v": torch.zeros(1, 4, 2, 8, device="meta")},
            "v is torch.float32 on meta, but q is torch.float32 on cpu",
        ),
        ({"q": torch.zeros(4, 4, 8)}, "q must be"),
        ({"documents": torch.tensor([[0, 1, 0, 1]])}, "must not decrease"),
        ({"documents": torch.zeros(1, 4)}, "must be integers"),
        (
            {"backend": "cuda"},
            "backend must be auto, torch, triton, flash or reference, got 'cuda'",
        ),
        (
            {"pattern": PerHead([Causal()])},
            "PerHead has patterns for 1 KV heads, but is asked for head 1",
        ),
        (
            {"pattern": BlockLists(2, torch.zeros(1, 1, 1).int())},
            "lists for 1 blocks of 2, but a document has 4 tokens",
        ),
        (
            {"pattern": BlockLists(4, torch.zeros(3, 1, 1).int()).from_head(2)},
            "lists for 3 KV heads, but is asked for head 3",
        ),
        (
            {"pattern": BlockLists(4, torch.zeros(3, 1, 1, 1).int())},
            "lists for a batch of 3, but q has 1 rows",
        ),
        ({"pattern": "S2"}, "pattern must be a Pattern such as S2.64, 16, 16., got 'S2'"),
        (
            {"sinks": torch.zeros(2)},
            r"sinks must be one number for each head of q, shape \(4,\), got \(2,\)",
        ),
        ({"softcap": 0.0}, "softcap must be positive, or None for no softcap, got 0"),
        ({"sinks": torch.zeros(4), "sigmoid_bias": 0.0}, "sinks needs the softmax"),
        ({"return_lse": True, "sigmoid_bias": 0.0}, "return_lse needs the softmax"),
    ],
)
def test_errors_name_the_invalid_argument(change, message):
    arguments = {
        "q": torch.zeros(1, 4, 4, 8),
        "k": torch.zeros(1, 4, 2, 8),
        "v": torch.zeros(1, 4, 2, 8),
        "pattern": Causal(),
    }
    with pytest.raises(ValueError, match=message):
        attend(**arguments | change)
