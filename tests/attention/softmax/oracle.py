"""Attention by its definition, over every pair in fp64, and errors relative to it."""

import torch
from torch import Tensor


def make(batch, length, heads, kv_heads, dim, value_dim=None, dtype=torch.float64) -> list[Tensor]:
    """Make queries, keys and values whose logits have a standard deviation of 5.

    A flatter softmax would hide errors.
    """
    generator = torch.Generator("cpu").manual_seed(length + heads)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")

    q = draw(batch, length, heads, dim) * 5.0
    k = draw(batch, length, kv_heads, dim)
    v = draw(batch, length, kv_heads, value_dim or dim)
    return [x.requires_grad_() for x in (q, k, v)]


def oracle(
    q, k, v, pattern, documents=None, scale=None, sinks=None, softcap=None, sigmoid_bias=None
):
    """Return output and log-sum-exp of the dense formula."""
    batch, length, heads, dim = q.shape
    group_size = heads // k.shape[2]
    ids = torch.zeros(batch, length) if documents is None else documents
    same_document = ids[:, :, None] == ids[:, None]  # [batch, queries, keys]
    positions = torch.arange(length) - same_document.int().argmax(-1)  # from the document's start
    masks = [pattern.mask(row, row, k.shape[2]) for row in positions]
    visible = torch.stack(masks) & same_document[:, None]  # [batch, kv_heads, queries, keys]

    visible = visible.repeat_interleave(group_size, 1)
    k = k.repeat_interleave(group_size, 2)
    v = v.repeat_interleave(group_size, 2)
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
    """Return the relative errors of ``run() -> (out, lse)`` and of every gradient, by name.

    They are compared with the oracle. Upstream gradients are random; queries that see nothing have
    none for the log-sum-exp.
    """
    fp64_inputs = [x.detach().double().requires_grad_() for x in inputs]
    names = ["q", "k", "v"]
    sinks = options.get("sinks")
    if sinks is not None:
        fp64_inputs.append(sinks.detach().double().requires_grad_())
        inputs = [*inputs, sinks]
        names.append("sinks")
        options = options | {"sinks": fp64_inputs[3]}
    expected = oracle(*fp64_inputs[:3], **options)
    ours = run()
    generator = torch.Generator("cpu").manual_seed(1)
    error_by_name = {}
    our_loss = 0.0
    expected_loss = 0.0
    for name, a, b in zip(("out", "lse"), ours, expected, strict=True):
        if b is None:
            continue
        seen = (b > -torch.inf) if name == "lse" else torch.ones_like(b, dtype=torch.bool)
        assert torch.equal(a[~seen].double(), b[~seen]), f"{name} of rows that see nothing"
        error_by_name[name] = relative(a[seen], b[seen])
        upstream = torch.randn(
            b[seen].shape, generator=generator, dtype=torch.float64, device="cpu"
        ).to(b.device)
        our_loss = our_loss + (a[seen].double() * upstream).sum()
        expected_loss = expected_loss + (b[seen].double() * upstream).sum()

    our_grads = torch.autograd.grad(our_loss, inputs)
    expected_grads = torch.autograd.grad(expected_loss, fp64_inputs)
    return error_by_name | {
        name: relative(a, b) for name, a, b in zip(names, our_grads, expected_grads, strict=True)
    }


def relative(a: Tensor, b: Tensor) -> float:
    """Return the relative error in norm, where norms below 1 count as 1."""
    assert not a.isnan().any()
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1))
