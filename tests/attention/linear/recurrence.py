"""Linear attention of every family by its recurrence in fp64, and errors relative to it."""

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
    """Arguments by name, all of which require gradients.

    Log-decays go down to ``-strength``; a third of them are exactly 0. Keys are of unit length, as
    the delta rule needs them.
    """
    generator = torch.Generator("cpu").manual_seed(length + heads)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    given = {
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
        given["decay"] = decay * (torch.rand(shape, generator=generator) < 0.67)
    if "delta" in family:
        given["beta"] = 2 * torch.rand(
            batch, length, heads, generator=generator, dtype=torch.float64
        )
    return {name: x.to(dtype).requires_grad_() for name, x in given.items()}


def recurrence(
    q, k, v, state, decay=None, beta=None, scale=1.0, documents=None
) -> tuple[Tensor, Tensor]:
    """Output and last state, token by token, by outer products."""
    group, outs = v.shape[2] // q.shape[2], []
    which = torch.arange(v.shape[2], device=v.device) // group  # the key head of each head
    for t in range(v.shape[1]):
        key, query = k[:, t, which, :, None], q[:, t, which, None, :]
        if t and documents is not None:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        if decay is not None:
            factor = decay.exp()[None] if decay.ndim == 1 else decay[:, t].exp()
            state = (factor[..., None] if factor.ndim == 3 else factor[..., None, None]) * state
        value = v[:, t, :, None]
        if beta is not None:
            value = beta[:, t, :, None, None] * (value - key.mT @ state)
        state = state + key @ value
        outs.append(scale * (query @ state)[..., 0, :])
    return torch.stack(outs, 1), state


def document_ids(rows: list[list[int]] | None) -> Tensor | None:
    """int32 ``[batch, time]`` from the lengths of each row's documents."""
    if rows is None:
        return None
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    ).int()


def errors(run, given: dict[str, Tensor], **options) -> dict[str, float]:
    """Return the relative errors of ``run(**given, **options) -> (out, last state)`` by name.

    And those of the gradient of every argument in ``given``, from random upstream gradients.
    """
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    results = run(**given, **options), recurrence(**wide, **options)
    generator = torch.Generator("cpu").manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results[1]]
    found = {name: relative(a, b) for name, a, b in zip(("out", "last"), *results, strict=True)}
    losses = [
        sum((x.double() * up.to(x.device)).sum() for x, up in zip(pair, upstream, strict=True))
        for pair in results
    ]
    gradients = [
        torch.autograd.grad(loss, list(own.values()))
        for loss, own in zip(losses, (given, wide), strict=True)
    ]
    return found | {name: relative(a, b) for name, a, b in zip(given, *gradients, strict=True)}


def relative(a: Tensor, b: Tensor) -> float:
    """Return the relative error in norm; tiny gradients are compared as if their norm was 1e-3."""
    assert not a.isnan().any()
    return float(
        (a.detach().cpu().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-3)
    )
