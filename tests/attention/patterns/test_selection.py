import pytest
import torch
from longspan.attention import MoBA, Window, attend

from ..softmax.oracle import document_ids, make, oracle, relative


def brute_force(q, k, documents, block, top_k):
    """Return which keys each query sees, one query block and head at a time.

    Returns:
        Bool ``[batch, kv_heads, time, time]``.
    """
    batch, length, _, _ = q.shape
    ids = torch.zeros(batch, length) if documents is None else documents
    kv_heads = k.shape[2]
    group_size = q.shape[2] // kv_heads
    visible = torch.zeros(batch, kv_heads, length, length, dtype=torch.bool)
    blocks = [slice(start, min(length, start + block)) for start in range(0, length, block)]
    for b in range(batch):
        for h in range(kv_heads):
            query_heads = slice(h * group_size, (h + 1) * group_size)
            for own_block, queries in enumerate(blocks):
                mean_query = q[b, queries, query_heads].mean((0, 1))
                document = ids[b, queries.start]
                earlier = [n for n in range(own_block) if ids[b, blocks[n].start] == document]
                earlier.sort(key=lambda n: -(mean_query @ k[b, blocks[n], h].mean(0)).item())
                for n in [own_block, *earlier[: top_k - 1]]:
                    visible[b, h, queries, blocks[n]] = True
    return visible & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("documents", [None, [40, 8, 25]], ids=["one", "packed"])
@pytest.mark.parametrize(("heads", "kv_heads", "top_k"), [(2, 2, 1), (6, 3, 3), (2, 1, 50)])
def test_parity_with_brute_force(heads, kv_heads, top_k, documents):
    q, k, v = make(2, 73, heads, kv_heads, 8)
    ids = None if documents is None else document_ids(documents)[:1].expand(2, -1)
    masks = iter(brute_force(q, k, ids, 8, top_k))  # the oracle asks once for each batch row

    class Chosen(Window):
        def mask(self, queries, keys, num_kv_heads):
            return next(masks)

    out = attend(q, k, v, MoBA(8, top_k), documents=ids)
    expected, _ = oracle(q, k, v, Chosen(1))
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    assert relative(out, expected) < 1e-10
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative(gradient, expected_gradient) < 1e-10


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


def test_moba_learns_to_retrieve_better_than_a_window_of_its_budget():
    chosen = accuracy(MoBA(BLOCK, TOP_K), 400)
    nearest = accuracy(Window(BLOCK * TOP_K), 400)
    assert nearest < 0.52, nearest  # the share of cards inside the window, plus guesses
    assert chosen > nearest + 0.08, (chosen, nearest)
