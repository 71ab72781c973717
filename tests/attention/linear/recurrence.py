"""The recurrence of every family of linear attention in fp64, and errors relative to it."""

import torch
from torch import Tensor

FAMILIES = ("none", "constant", "scalar", "vector", "delta", "gated delta", "gated delta by key")


def make(
    family,
    length=130,
    heads=4,
    key_heads=2,
    dim=8,
    value_dim=5,
    strength=0.2,
    batch=2,
    dtype=torch.float64,
):
    """Return the arguments by name; all of them require gradients.

    Log-decays lie between ``-strength`` and 0, and a third of them are exactly 0. Keys have unit
    length, as the delta rule needs.
    """
    generator = torch.Generator("cpu").manual_seed(length + heads)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    arguments = {
        "q": draw(batch, length, key_heads, dim),
        "k": torch.nn.functional.normalize(draw(batch, length, key_heads, dim), dim=-1),
        "v": draw(batch, length, heads, value_dim),
        "state": draw(batch, heads, dim, value_dim),
    }
    shape = {
        "constant": (heads,),
        "scalar": (batch, length, heads),
        "gated delta": (batch, length, heads),
    }.get(family)
    if family in ("vector", "gated delta by key"):
        shape = (batch, length, heads, dim)
    if shape:
        decay = -strength * torch.rand(shape, generator=generator, dtype=torch.float64)
        arguments["decay"] = decay * (torch.rand(shape, generator=generator) < 0.67)
    if "delta" in family:
        arguments["beta"] = 2 * torch.rand(
            batch, length, heads, generator=generator, dtype=torch.float64
        )
    return {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}


def recurrence(
    q, k, v, state, decay=None, beta=None, scale=1.0, documents=None
) -> tuple[Tensor, Tensor]:
    """Compute the output and the final state token by token, by outer products."""
    group_size = v.shape[2] // q.shape[2]
    key_head = torch.arange(v.shape[2], device=v.device) // group_size  # of each value head
    outs = []
    for t in range(v.shape[1]):
        key = k[:, t, key_head, :, None]  # [batch, heads, dim, 1]
        query = q[:, t, key_head, None, :]  # [batch, heads, 1, dim]
        if t and documents is not None:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        if decay is not None:
            factor = decay.exp()[None] if decay.ndim == 1 else decay[:, t].exp()
            state = (factor[..., None] if factor.ndim == 3 else factor[..., None, None]) * state
        value = v[:, t, :, None]  # [batch, heads, 1, value dim]
        if beta is not None:
            value = beta[:, t, :, None, None] * (value - key.mT @ state)
        state = state + key @ value
        outs.append(scale * (query @ state)[..., 0, :])
    return torch.stack(outs, 1), state


def document_ids(lengths_by_row: list[list[int]] | None) -> Tensor | None:
    """Return int32 ``[batch, time]`` from the lengths of each row's documents."""
    if lengths_by_row is None:
        return None
    rows = [
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        for lengths in lengths_by_row
    ]
    return torch.stack(rows).int()


def errors(run, arguments: dict[str, Tensor], **options) -> dict[str, float]:
    """Return the relative errors of ``run(**arguments, **options) -> (out, final state)`` by name.

    The errors of the gradients of all ``arguments`` are included, from random upstream gradients.
    """
    fp64_arguments = {name: x.detach().double().requires_grad_() for name, x in arguments.items()}
    ours = run(**arguments, **options)
    expected = recurrence(**fp64_arguments, **options)
    output_errors = {
        name: relative(a, b) for name, a, b in zip(("out", "last"), ours, expected, strict=True)
    }

    generator = torch.Generator("cpu").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]

    def gradients(outputs, inputs):
        loss = sum(
            (x.double() * upstream_grad.to(x.device)).sum()
            for x, upstream_grad in zip(outputs, upstream, strict=True)
        )
        return torch.autograd.grad(loss, list(inputs.values()))

    our_grads = gradients(ours, arguments)
    expected_grads = gradients(expected, fp64_arguments)
    return output_errors | {
        name: relative(a, b)
        for name, a, b in zip(arguments, our_grads, expected_grads, strict=True)
    }


def relative(a: Tensor, b: Tensor) -> float:
    """Return the relative error in norm, where norms below 1e-3 count as 1e-3."""
    assert not a.isnan().any()
    return float(
        (a.detach().cpu().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-3)
    )
