"""Attention by its definition, with autograd and every pair in fp64; and distances from it."""

import torch
from torch import Tensor


def make(batch, length, heads, kv_heads, dim, value_dim=None, dtype=torch.float64) -> list[Tensor]:
    """Make queries, keys and values whose logits have a standard deviation of 5.

    Flat softmaxes hide errors.
    """
    generator = torch.Generator("cpu").manual_seed(length + heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")  # noqa: E731
    q = draw(batch, length, heads, dim) * 5.0
    k, v = draw(batch, length, kv_heads, dim), draw(batch, length, kv_heads, value_dim or dim)
    return [x.requires_grad_() for x in (q, k, v)]


def oracle(
    q, k, v, pattern, documents=None, scale=None, sinks=None, softcap=None, sigmoid_bias=None
):
    """Return output and log-sum-exp of the dense formula."""
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    ids = torch.zeros(batch, length) if documents is None else documents
    same = ids[:, :, None] == ids[:, None]
    positions = torch.arange(length) - same.int().argmax(-1)  # from each document's start
    masks = [pattern.mask(row, row, k.shape[2]) for row in positions]
    visible = torch.stack(masks) & same[:, None]  # [batch, kv_heads, queries, keys]
    visible = visible.repeat_interleave(group, 1)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if sigmoid_bias is not None:
        p = torch.sigmoid(s + sigmoid_bias) * visible
        return torch.einsum("bhqk,bkhd->bqhd", p, v), None
    s = s.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(batch, heads, length, 1)], -1)
    seen = (s > -torch.inf).any(-1, keepdim=True)
    lse = torch.where(seen, s.where(seen, 0.0).logsumexp(-1, keepdim=True), -torch.inf)
    p = torch.where(seen, s - lse.where(seen, 0.0), -torch.inf).exp()[..., :length]
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse[..., 0].transpose(1, 2)


def document_ids(lengths, batch=2) -> Tensor | None:
    """Return int32 ``[batch, time]``; the second row has the documents in the opposite order."""
    if lengths is None:
        return None
    documents = torch.arange(len(lengths), device="cpu")
    ids = documents.repeat_interleave(torch.tensor(lengths, device="cpu"))
    ids = ids.expand(batch, -1).int().clone()
    ids[1] = ids[1].flip(0).max() - ids[1].flip(0)
    return ids


def errors(run, inputs, expected_inputs=None, **options) -> dict[str, float]:
    """Compare ``run() -> (out, lse)`` and every gradient with the oracle. Returns relative errors.

    Upstream gradients are random; queries that see nothing have none for the log-sum-exp.
    """
    wide = [x.detach().double().requires_grad_() for x in inputs]
    names, sinks = ["q", "k", "v"], options.get("sinks")
    if sinks is not None:
        wide.append(sinks.detach().double().requires_grad_())
        inputs, names = [*inputs, sinks], [*names, "sinks"]
        options = options | {"sinks": wide[3]}
    expected = oracle(*wide[:3], **options)
    ours = run()
    generator = torch.Generator("cpu").manual_seed(1)
    found = {}
    losses = [0.0, 0.0]
    for name, a, b in zip(("out", "lse"), ours, expected, strict=True):
        if b is None:
            continue
        seen = (b > -torch.inf) if name == "lse" else torch.ones_like(b, dtype=torch.bool)
        assert torch.equal(a[~seen].double(), b[~seen]), f"{name} of rows that see nothing"
        found[name] = relative(a[seen], b[seen])
        upstream = torch.randn(
            b[seen].shape, generator=generator, dtype=torch.float64, device="cpu"
        ).to(b.device)
        losses = [
            loss + (x[seen].double() * upstream).sum()
            for loss, x in zip(losses, (a, b), strict=True)
        ]
    ours = torch.autograd.grad(losses[0], inputs)
    expected = torch.autograd.grad(losses[1], wide)
    return found | {name: relative(a, b) for name, a, b in zip(names, ours, expected, strict=True)}


def relative(a: Tensor, b: Tensor) -> float:
    assert not a.isnan().any()
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1))
