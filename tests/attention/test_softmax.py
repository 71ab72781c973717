import pytest
import torch
from longspan.attention import S2, Causal, attend

DOCUMENTS = {"one": None, "edges": [17, 1, 24, 31], "aligned": [32, 8, 33], "tiny": [1] * 73}


def make(batch, length, heads, kv_heads, dim, value_dim=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length + heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    q = draw(batch, length, heads, dim) * 5.0  # peaked: logits with a standard deviation of 5
    k, v = draw(batch, length, kv_heads, dim), draw(batch, length, kv_heads, value_dim or dim)
    return [x.requires_grad_() for x in (q, k, v)]


def oracle(q, k, v, pattern, documents):
    """Brute force: every pair, one softmax row at a time."""
    batch, length, heads, dim = q.shape
    group, rows = heads // k.shape[2], []
    ids = torch.zeros(batch, length) if documents is None else documents
    for b in range(batch):
        starts = [next(j for j in range(length) if ids[b, j] == ids[b, i]) for i in range(length)]
        at = torch.arange(length) - torch.tensor(starts)
        same = ids[b][:, None] == ids[b]
        for i in range(length):
            for h in range(heads):
                mask = pattern.mask(at[i : i + 1], at, k.shape[2])[h // group, 0] & same[i]
                logits = (q[b, i, h] @ k[b, mask, h // group].T) * dim**-0.5
                rows.append(logits.softmax(-1) @ v[b, mask, h // group])
    return torch.stack(rows).view(batch, length, heads, -1)


def compare(pattern, documents, heads, kv_heads, value_dim=None, backend="torch"):
    inputs = make(2, 73, heads, kv_heads, 16, value_dim)
    ids = None
    if documents is not None:
        ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(2, -1).int().clone()
        ids[1] = ids[1].flip(0).max() - ids[1].flip(0)
    ours = attend(*inputs, pattern, documents=ids, backend=backend)
    expected = oracle(*inputs, pattern, ids)
    upstream = torch.randn_like(ours)
    errors = {"out": (ours - expected).norm() / expected.norm()}
    gradients = zip("qkv", *(torch.autograd.grad(out, inputs, upstream) for out in (ours, expected)), strict=True)
    return errors | {name: (a - b).norm() / b.norm().clamp(min=1) for name, a, b in gradients}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("pattern", [Causal(), S2(8, 2, 3), S2(4, 1, 16, head_step=5)], ids=str)
def test_parity_with_brute_force(pattern, documents, backend):
    for name, error in compare(pattern, documents, 4, 2, backend=backend).items():
        assert error < 1e-10, name


@pytest.mark.parametrize(("heads", "kv_heads", "value_dim"), [(1, 1, 16), (6, 3, 8), (4, 1, 32), (3, 3, 16)])
def test_head_ratios_and_value_dims(heads, kv_heads, value_dim):
    for name, error in compare(S2(8, 2, 4), DOCUMENTS["edges"], heads, kv_heads, value_dim).items():
        assert error < 1e-10, name


@pytest.mark.parametrize("pattern", [Causal(), S2(8, 2, 3)], ids=str)
def test_devices_without_the_flash_kernel(pattern, monkeypatch):
    monkeypatch.setattr("longspan.attention.tiles._FLASH_DEVICES", set())
    for name, error in compare(pattern, DOCUMENTS["edges"], 6, 3, value_dim=8).items():
        assert error < 1e-10, name


def test_a_stripe_off_by_one_and_a_band_too_short_are_caught(monkeypatch):
    real = S2.need
    monkeypatch.setattr(S2, "need", lambda self, a, b, head: real(self, a, b, head + 1))
    assert max(compare(S2(4, 2, 5), None, 4, 2).values()) > 1e-3
    monkeypatch.setattr(
        S2, "need", lambda self, a, b, head: real(S2(self.block, self.local_blocks - 1, self.stride), a, b, head)
    )
    assert max(compare(S2(4, 2, 5), None, 4, 2).values()) > 1e-3


def test_bf16_inputs_stay_close():
    q, k, v = (x.detach() for x in make(1, 200, 4, 2, 32, dtype=torch.float32))
    exact = attend(q, k, v, S2(16, 2, 2), backend="reference")
    ours = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), S2(16, 2, 2))
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 3, 8)}, "2 heads, which do not divide the 3 heads"),
        ({"k": torch.zeros(1, 5, 2, 8)}, "shapes do not fit"),
        ({"v": torch.zeros(1, 4, 2, 8, dtype=torch.float64)}, "v is torch.float64"),
        ({"q": torch.zeros(4, 4, 8)}, "q must be"),
        ({"documents": torch.tensor([[0, 1, 0, 1]])}, "must not decrease"),
        ({"documents": torch.zeros(1, 4)}, "must be integers"),
        ({"backend": "cuda"}, "backend must be auto, torch or reference"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"q": torch.zeros(1, 4, 4, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8)}
    with pytest.raises(ValueError, match=message):
        attend(**arguments | change, pattern=Causal())
