import pytest
import torch
from longspan.attention import linear_attention

DOCUMENTS = {"one": None, "edges": [17, 1, 46, 64, 1, 71], "chunks": [64, 64, 72]}


def make(length=200, heads=3, dim=8, value_dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    q, k, v = draw(2, length, heads, dim), draw(2, length, heads, dim), draw(2, length, heads, value_dim)
    return [x.requires_grad_() for x in (q, k, v, draw(2, heads, dim, value_dim))]


def ids(documents):
    if documents is None:
        return None
    rows = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).int()
    return torch.stack([rows, rows.max() - rows.flip(0)])


def pairwise(q, k, v, state, decay, documents):
    """The quadratic form: every pair of a document, and the incoming state for the first document."""
    length = q.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    documents = torch.zeros(2, length) if documents is None else documents
    see = (lag >= 0) & (documents[:, :, None] == documents[:, None])
    weights = (decay[:, None, None] * lag.clamp(min=0)).exp() * see[:, None]
    out = torch.einsum("bihk,bjhk,bhij,bjhv->bihv", q, k, weights, v)
    first = (documents == documents[:, :1])[:, :, None, None]
    reach = (decay * torch.arange(1, length + 1)[:, None]).exp()[:, :, None]
    return out + torch.einsum("bihk,bhkv->bihv", q, state) * reach * first


def errors(ours, expected, inputs):
    upstream = torch.randn_like(ours)
    found = {"out": (ours - expected).norm() / expected.norm()}
    for name, a, b in zip(
        ("q", "k", "v", "state"), *(torch.autograd.grad(x, inputs, upstream) for x in (ours, expected)), strict=True
    ):
        found[name] = (a - b).norm() / b.norm()
    return found


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("decay", [[0.0, -0.01, -0.5], [-2.0, -120.0, -1e-5]], ids=["weak", "strong"])
def test_parity_with_the_quadratic_form(decay, documents, backend):
    inputs, decay = make(), torch.tensor(decay, dtype=torch.float64)
    ours = linear_attention(*inputs[:3], decay=decay, state=inputs[3], documents=ids(documents), backend=backend)
    found = errors(ours, pairwise(*inputs, decay, ids(documents)), inputs)
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_segments_hand_their_state_on(documents, monkeypatch):
    monkeypatch.setattr("longspan.attention.linear._SEGMENT", 64)
    inputs, decay = make(), torch.tensor([0.0, -0.01, -0.5], dtype=torch.float64)
    ours = linear_attention(*inputs[:3], decay=decay, state=inputs[3], documents=ids(documents))
    assert max(errors(ours, pairwise(*inputs, decay, ids(documents)), inputs).values()) < 1e-10


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_odd_lengths(length):
    inputs, decay = make(length), torch.tensor([0.0, -0.1, -1.0], dtype=torch.float64)
    ours = linear_attention(*inputs[:3], decay=decay, state=inputs[3])
    assert max(errors(ours, pairwise(*inputs, decay, None), inputs).values()) < 1e-10


@pytest.mark.parametrize("cut", [1, 64, 100, 199])
def test_a_state_handed_on_changes_nothing(cut):
    inputs, decay = make(), torch.tensor([0.0, -0.1, -1.0], dtype=torch.float64)
    documents = ids([100, 60, 40])
    whole, last = linear_attention(*inputs[:3], decay=decay, documents=documents, return_state=True)
    state, outs = None, []
    for part in (slice(0, cut), slice(cut, None)):
        pieces = (x[:, part] for x in inputs[:3])
        if state is not None:  # a state belongs to the document that goes on; the caller drops it at an edge
            state = state * (documents[:, cut] == documents[:, cut - 1])[:, None, None, None]
        out, state = linear_attention(*pieces, decay=decay, documents=documents[:, part], state=state, return_state=True)
        outs.append(out)
    assert (torch.cat(outs, 1) - whole).norm() / whole.norm() < 1e-12
    assert (state - last).norm() / last.norm() < 1e-12


def test_the_state_is_the_one_after_the_last_token():
    inputs, decay = make(5), torch.tensor([0.0, -0.1, -1.0], dtype=torch.float64)
    q, k, v, _ = inputs
    state = torch.zeros(2, 3, 8, 5, dtype=torch.float64)
    for t in range(5):
        state = decay.exp()[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
    found = linear_attention(q, k, v, decay=decay, return_state=True)[1]
    assert torch.allclose(found, state, rtol=1e-12)


def test_a_state_decayed_once_too_often_is_caught():
    inputs, decay = make(), torch.tensor([-0.01, -0.1, -1.0], dtype=torch.float64)
    wrong = linear_attention(*inputs[:3], decay=decay, state=inputs[3] * decay.exp()[:, None, None])
    assert max(errors(wrong, pairwise(*inputs, decay, None), inputs).values()) > 1e-3


def test_fp32_and_bf16_accumulate_in_fp32():
    q, k, v, _ = (x.detach() for x in make(dtype=torch.float32))
    decay = torch.tensor([0.0, -0.01, -0.5])
    exact = linear_attention(q.double(), k.double(), v.double(), decay=decay, backend="reference")
    ours, state = linear_attention(q, k, v, decay=decay, return_state=True)
    assert (ours - exact).norm() / exact.norm() < 1e-5
    low, state = linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), decay=decay, return_state=True)
    assert (low.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (low - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.zeros(2)}, r"decay must be one number per head, shape \(3,\)"),
        ({"decay": torch.zeros(3, dtype=torch.bfloat16)}, "decay must be float32"),
        ({"state": torch.zeros(1, 3, 4, 5)}, r"state must be \(1, 3, 4, 4\)"),
        ({"k": torch.zeros(1, 6, 2, 4)}, "shapes do not fit"),
        ({"documents": torch.zeros(1, 5).int()}, r"documents must be integers of shape \(1, 6\)"),
        ({"documents": torch.tensor([[0, 0, 1, 0, 0, 0]])}, "must not decrease"),
        ({"backend": "fla"}, "backend must be auto, torch or reference"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {name: torch.zeros(1, 6, 3, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments | change)
