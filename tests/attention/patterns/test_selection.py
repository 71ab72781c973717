import pytest
import torch
from longspan.attention import MoBA, Window, attend

from ..softmax.oracle import document_ids, make, oracle, relative


def brute_force(q, k, documents, block, top_k):
    """Which blocks each query sees, one query block and head at a time: bool ``[batch, kv_heads, time, time]``."""
    batch, length, _, _ = q.shape
    ids = torch.zeros(batch, length) if documents is None else documents
    seen = torch.zeros(batch, k.shape[2], length, length, dtype=torch.bool)
    parts = [slice(start, min(length, start + block)) for start in range(0, length, block)]
    for b in range(batch):
        for h in range(k.shape[2]):
            group = slice(h * q.shape[2] // k.shape[2], (h + 1) * q.shape[2] // k.shape[2])
            for own, rows in enumerate(parts):
                query = q[b, rows, group].mean((0, 1))
                earlier = [n for n in range(own) if ids[b, parts[n].start] == ids[b, rows.start]]
                earlier.sort(key=lambda n: -(query @ k[b, parts[n], h].mean(0)).item())
                for n in [own, *earlier[: top_k - 1]]:
                    seen[b, h, rows, parts[n]] = True
    return seen & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("documents", [None, [40, 8, 25]], ids=["one", "packed"])
@pytest.mark.parametrize(("heads", "kv_heads", "top_k"), [(2, 2, 1), (6, 3, 3), (2, 1, 50)])
def test_parity_with_brute_force(heads, kv_heads, top_k, documents):
    q, k, v = make(2, 73, heads, kv_heads, 8)
    ids = None if documents is None else document_ids(documents)[:1].expand(2, -1)
    seen = brute_force(q, k, ids, 8, top_k)

    class Chosen(Window):
        def mask(self, queries, keys, num_kv_heads):
            return next(masks)

    masks = iter(seen)
    out = attend(q, k, v, MoBA(8, top_k), documents=ids)
    expected, _ = oracle(q, k, v, Chosen(1))
    upstream = torch.randn_like(out)
    ours, wanted = (torch.autograd.grad(x, (q, k, v), upstream) for x in (out, expected))
    assert relative(out, expected) < 1e-10
    for a, b in zip(ours, wanted, strict=True):
        assert relative(a, b) < 1e-10


def test_bad_arguments_are_named():
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


LENGTH, BLOCK, TOP_K, VALUES = 128, 8, 3, 8
KEYS = LENGTH // BLOCK * (BLOCK // 2)


def cards(generator, batch=16):
    """Blocks of cards, each a key with a value, and as often the question for one key that was shown in some block before.

    Gives keys, values (of the questions: what the answer is) and which tokens are questions.
    """
    blocks = LENGTH // BLOCK
    shown = (
        torch.rand(batch, KEYS, generator=generator).argsort(1).view(batch, blocks, BLOCK // 2)
    )  # each key once
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
    """One attention layer: as much as the task needs."""

    def __init__(self, pattern, dim=64):
        super().__init__()
        self.pattern = pattern
        self.key, self.value = torch.nn.Embedding(KEYS, dim), torch.nn.Embedding(VALUES, dim)
        self.asks = torch.nn.Embedding(2, dim)
        self.qkv, self.out = (
            torch.nn.Linear(3 * dim, 3 * dim, bias=False),
            torch.nn.Linear(dim, VALUES),
        )
        with torch.no_grad():  # a question begins a little like its card: else hundreds of steps go by before anything is found
            self.qkv.weight[:dim] = self.qkv.weight[dim : 2 * dim]

    def forward(self, keys, values, asks):
        shown = self.value(values) * ~asks[..., None]  # a question does not tell the answer
        x = torch.cat([self.key(keys), shown, self.asks(asks.long())], -1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, -1)).unbind(2)
        return self.out(attend(q, k, v, self.pattern).squeeze(2))


def accuracy(pattern, steps):
    """Of the answers after ``steps`` of training, on new sequences."""
    torch.manual_seed(0)
    model, generator = Retriever(pattern), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        keys, values, asks = cards(generator)
        loss = torch.nn.functional.cross_entropy(model(keys, values, asks)[asks], values[asks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keys, values, asks = cards(generator, batch=64)
    with torch.no_grad():
        return float((model(keys, values, asks).argmax(-1) == values)[asks].float().mean())


def test_trained_it_finds_what_a_window_of_the_same_budget_cannot():
    chosen, nearest = accuracy(MoBA(BLOCK, TOP_K), 400), accuracy(Window(BLOCK * TOP_K), 400)
    assert nearest < 0.52, nearest  # what lies within the window, and guesses
    assert chosen > nearest + 0.08, (chosen, nearest)
