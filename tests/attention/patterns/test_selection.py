import itertools

import pytest
import torch
from longspan.attention import MoBA, Window, attend

from ..softmax.oracle import document_ids, make, relative


def brute_force(q, k, documents, moba):
    """Return which keys each query head sees: bool ``[batch, heads, time, time]``."""
    batch, length, heads, _ = q.shape
    ids = torch.zeros(batch, length) if documents is None else documents
    group_size = heads // k.shape[2]
    visible = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        kv_head = h // group_size
        chooser = slice(h, h + 1)
        if moba.select == "group":
            chooser = slice(kv_head * group_size, (kv_head + 1) * group_size)
        query = q[b, i, chooser].mean(0)

        own = i // moba.block
        blocks = [slice(n * moba.block, (n + 1) * moba.block) for n in range(own + 1)]
        earlier = [n for n in range(own) if ids[b, blocks[n].start] == ids[b, i]]
        earlier.sort(key=lambda n: -(query @ k[b, blocks[n], kv_head].mean(0)).item())
        for n in [own, *earlier[: moba.top_k - 1]]:
            visible[b, h, i, blocks[n]] = True
    return visible & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("documents", [None, [40, 8, 25]], ids=["one", "packed"])
@pytest.mark.parametrize("select", ["group", "head"])
@pytest.mark.parametrize(("heads", "kv_heads", "top_k"), [(2, 2, 1), (6, 3, 3), (2, 1, 50)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_parity_with_brute_force(heads, kv_heads, top_k, select, documents, backend):
    q, k, v = make(2, 73, heads, kv_heads, 8)
    ids = None if documents is None else document_ids(documents)[:1].expand(2, -1)
    moba = MoBA(8, top_k, select)
    with torch.no_grad():
        visible = brute_force(q, k, ids, moba)

    # Every head has keys of its own, so that each can have a mask of its own.
    group_size = heads // kv_heads
    own_k, own_v = (x.repeat_interleave(group_size, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, own_k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), own_v)
    expected_lse = scores.logsumexp(-1).transpose(1, 2)

    results = attend(q, k, v, moba, documents=ids, return_lse=True, backend=backend)
    upstream = [torch.randn_like(x) for x in results]
    gradients = torch.autograd.grad(results, (q, k, v), upstream)
    expected_gradients = torch.autograd.grad((expected, expected_lse), (q, k, v), upstream)
    for result, expectation in zip(
        (*results, *gradients), (expected, expected_lse, *expected_gradients), strict=True
    ):
        assert relative(result, expectation) < 1e-10


@pytest.mark.parametrize("option", [{"sinks": torch.randn(6)}, {"softcap": 2.0}, {"scale": 3.0}])
def test_options_of_the_logits(option):
    q, k, v = make(1, 73, 6, 3, 8)
    option = {name: x.double() if torch.is_tensor(x) else x for name, x in option.items()}
    ours, expected = (
        attend(q, k, v, MoBA(8, 3, "head"), backend=backend, **option)
        for backend in ("torch", "reference")
    )
    upstream = torch.randn_like(ours)
    assert relative(ours, expected) < 1e-10
    for gradient, expectation in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        assert relative(gradient, expectation) < 1e-10


@pytest.mark.parametrize("select", ["group", "head"])
@pytest.mark.parametrize("first", [130, 200, 300, 301, 320, 350, 400, 450])
def test_later_tokens_change_no_choice(first, select):
    """All tokens from ``first`` on are replaced: single ones seldom turn a choice."""
    q, k, v = (4 * x.detach() for x in make(1, 512, 4, 2, 16))
    moba = MoBA(32, 3, select)
    before = attend(q, k, v, moba)[:, :first]
    for x in (q, k, v):
        x[:, first:] = 4 * torch.randn_like(x[:, first:])
    assert relative(attend(q, k, v, moba)[:, :first], before) < 1e-14


def test_of_equal_scores_the_earlier_block_wins():
    """Also of negative ones, and of zeros of either sign."""
    summaries = torch.zeros(1, 5, 1, 1)
    q = torch.ones(1, 1, 1, 1)
    candidates = torch.tensor([[[True, True, True, True, False]]])
    own = torch.tensor([4])
    for scores, expected in (
        ([2.0, 3.0, 3.0, 3.0], [4, 1, 2]),
        ([-2.0, -1.0, -2.0, -2.0], [4, 1, 0]),
        ([-0.0, 0.0, -0.0, 0.0], [4, 0, 1]),
        ([-1e-40, 1e-40, 0.0, 0.0], [4, 1, 2]),
    ):
        summaries[0, :4, 0, 0] = torch.tensor(scores)
        assert MoBA(8, 3).choose(q, summaries, own, candidates)[0, 0, 0].tolist() == expected


def test_work_follows_what_is_seen(monkeypatch):
    """Ten times the tokens are ten times the pairs, where full attention has a hundred times."""
    from longspan.attention.softmax import chosen_blocks

    pairs = []

    def counted(q, k, v, mask, logits):
        pairs[-1] += q.shape[0] * q.shape[2] * k.shape[2]
        return forward(q, k, v, mask, logits)

    forward = chosen_blocks.piece_forward
    monkeypatch.setattr(chosen_blocks, "piece_forward", counted)
    for length in (512, 5120):
        pairs.append(0)
        q, k, v = make(1, length, 2, 2, 8, dtype=torch.float32)
        attend(q, k, v, MoBA(64, 3))
    assert pairs[1] < 12 * pairs[0]
    assert pairs[1] < 1.5 * 2 * 5120 * 3 * 64


def test_errors_name_the_invalid_argument():
    x = torch.zeros(1, 8, 1, 4)
    with pytest.raises(
        ValueError,
        match=r"documents must start at multiples of the pattern's block 4, got one at 3",
    ):
        attend(x, x, x, MoBA(4, 2), documents=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"MoBA.top_k must be a whole number of at least 1, got 0"):
        MoBA(64, 0)
    with pytest.raises(ValueError, match=r"MoBA.block must be a power of two"):
        MoBA(48, 2)
    with pytest.raises(ValueError, match=r"MoBA.select must be group or head, got 'token'"):
        MoBA(64, 2, "token")


LENGTH = 128
BLOCK = 8
TOP_K = 3
VALUES = 8
KEYS = LENGTH // BLOCK * (BLOCK // 2)


def cards_and_questions(generator, batch=16):
    """Make sequences of cards and questions.

    The first half of each block consists of cards, each a key with a value. The second half asks
    for one key of an earlier block.

    Returns:
        Keys, values (for a question, its answer), and which tokens are questions; all
        ``[batch, LENGTH]``.
    """
    blocks = LENGTH // BLOCK
    # Each key is shown once.
    shown = torch.rand(batch, KEYS, generator=generator).argsort(1)
    shown = shown.view(batch, blocks, BLOCK // 2)
    keys = torch.cat([shown, shown], -1)
    values = torch.randint(VALUES, (batch, KEYS), generator=generator)
    earlier = (
        torch.rand(batch, blocks, generator=generator) * torch.arange(blocks).clamp(min=1)
    ).long()
    card = torch.randint(BLOCK // 2, (batch, blocks), generator=generator)
    rows = torch.arange(batch)[:, None]
    keys[:, :, -BLOCK // 2 :] = keys[rows, earlier, card][..., None]
    asks = torch.zeros(batch, blocks, BLOCK, dtype=torch.bool)
    asks[:, 1:, -BLOCK // 2 :] = True
    keys = keys.flatten(1)
    return keys, values.gather(1, keys), asks.flatten(1)


class Retriever(torch.nn.Module):
    """A single attention layer, which is enough for the task."""

    def __init__(self, pattern, dim=64):
        super().__init__()
        self.pattern = pattern
        self.key = torch.nn.Embedding(KEYS, dim)
        self.value = torch.nn.Embedding(VALUES, dim)
        self.asks = torch.nn.Embedding(2, dim)
        self.qkv = torch.nn.Linear(3 * dim, 3 * dim, bias=False)
        self.out = torch.nn.Linear(dim, VALUES)
        # Queries and keys start alike, so that a question attends to its card a little; otherwise
        # training takes hundreds of steps until anything is found.
        with torch.no_grad():
            self.qkv.weight[:dim] = self.qkv.weight[dim : 2 * dim]

    def forward(self, keys, values, asks):
        shown = self.value(values) * ~asks[..., None]  # a question does not show its answer
        x = torch.cat([self.key(keys), shown, self.asks(asks.long())], -1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, -1)).unbind(2)
        return self.out(attend(q, k, v, self.pattern).squeeze(2))


def accuracy(pattern, steps):
    """Return the share of right answers on new sequences, after ``steps`` of training."""
    torch.manual_seed(0)
    model = Retriever(pattern)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        keys, values, asks = cards_and_questions(generator)
        loss = torch.nn.functional.cross_entropy(model(keys, values, asks)[asks], values[asks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keys, values, asks = cards_and_questions(generator, batch=64)
    with torch.no_grad():
        return float((model(keys, values, asks).argmax(-1) == values)[asks].float().mean())


@pytest.mark.wide
def test_moba_learns_to_retrieve_better_than_a_window_of_its_budget():
    chosen = accuracy(MoBA(BLOCK, TOP_K), 150)
    nearest = accuracy(Window(BLOCK * TOP_K), 150)
    assert nearest < 0.52, nearest  # the share of cards inside the window, plus guesses
    assert chosen > nearest + 0.08, (chosen, nearest)
