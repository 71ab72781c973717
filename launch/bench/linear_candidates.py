"""What ``longspan bench linear`` measures: the call that each linear mixer makes, and dense attention of the same width."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.linear import decays
from ...attention.linear.attention import linear_attention, normalised
from ...attention.linear.feature_maps import MAPS, hedgehog
from ...trainer.layers.linear import LinearAttentionBlock, LinearDesign
from ...trainer.layers.registry import KINDS
from . import measure
from .measure import Work

BLOCKS = {block.kind(): block for block in KINDS if issubclass(block, LinearAttentionBlock)}
"""Of each mixer with linear attention, by name."""
CHECKED_TOKENS = 600
"""At most so many are checked, as the reference goes token by token: more than a segment of a backend, and no whole chunks."""


@dataclass(frozen=True)
class Width:
    """That all candidates have, and what their tensors are."""

    heads: int
    head_dim: int
    dtype: str

    def design(self, mixer: str) -> LinearDesign:
        """The mixer's preset in a model of this width; ValueError where it has none."""
        return BLOCKS[mixer](mixer=mixer).design(
            SimpleNamespace(num_attention_heads=self.heads, kv_channels=self.head_dim)
        )


def linear_work(width: Width, mixer: str, backend: str, length: int) -> Work:
    """Of the mixer's own shapes; every tensor that the mixer makes from its input has a gradient."""
    design = width.design(mixer)
    inputs, upstream = _tensors(design, length, width.dtype)
    return measure.step_of(_operation(design, inputs, backend), list(inputs.values()), upstream)


def dense_work(width: Width, length: int) -> Work:
    """Causal softmax attention, ``[1, heads, time, head_dim]``."""
    draw = _draws(length, width.dtype)
    *inputs, upstream = (
        draw(width.heads, width.head_dim).transpose(1, 2).contiguous() for _ in range(4)
    )
    return measure.step_of(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs, upstream
    )


def linear_fault(width: Width, mixer: str, backend: str, length: int) -> str | None:
    """What is wrong with the output or a gradient, compared with the recurrence in fp64 on the same numbers."""
    design = width.design(mixer)
    inputs, upstream = _tensors(design, min(length, CHECKED_TOKENS), width.dtype)
    exact = {name: x.double() for name, x in inputs.items()}
    results = measure.step_of(
        _operation(design, inputs, backend), list(inputs.values()), upstream
    )()
    wanted = measure.step_of(
        _operation(design, exact, "reference"), list(exact.values()), upstream.double()
    )()
    names = ["output", *(f"gradient of {name}" for name in inputs)]
    # Decays and betas may have no dims: [batch, time, heads].
    pairs = (
        (x if x.ndim == 4 else x[..., None] for x in pair)
        for pair in zip(results, wanted, strict=True)
    )
    return measure.wrong(
        ((name, *pair) for name, pair in zip(names, pairs, strict=True)), width.dtype
    )


def tensor_bytes(width: Width, mixer: str | None, length: int) -> int:
    """Of the inputs, the output and the gradients of these; ``mixer`` None for dense attention."""
    if mixer is None:
        return 2 * 4 * width.heads * width.head_dim * length * getattr(torch, width.dtype).itemsize
    inputs, upstream = _tensors(width.design(mixer), 1, width.dtype)
    return 2 * length * sum(x.nbytes for x in (*inputs.values(), upstream))


def _operation(design: LinearDesign, names, backend: str) -> Callable[..., Tensor]:
    """``function(*tensors)`` of the tensors ``names``, in this order."""
    fixed = (
        {"decay": decays.minimax(design.heads, 0, 2).to(measure.device())}
        if _is_fixed(design)
        else {}
    )

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True)) | fixed
        if design.normalised:
            given["v"] = F.pad(given["v"], (0, 1), value=1.0)
        out = linear_attention(**given, scale=design.scale, backend=backend)
        return normalised(out) if design.normalised else out

    return function


def _is_fixed(design: LinearDesign) -> bool:
    return design.decay not in ("none", "sigmoid", "softplus")


def _tensors(design: LinearDesign, length: int, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs by name, as :func:`~longspan.attention.linear_attention` takes them, and the upstream gradient."""
    draw = _draws(length, dtype)
    found = {name: _features(design, draw(design.key_heads, design.key_dim)) for name in "qk"}
    found["v"] = draw(design.heads, design.value_dim)
    if design.decay != "none" and not _is_fixed(design):
        x = draw(design.heads, *([design.key_dim] if design.decay_rank else [])).float()
        # Of the size that the mixers begin with: weak, or rates up to 16 times steps of about 0.01.
        found["decay"] = (
            F.logsigmoid(x) / 16 if design.decay == "sigmoid" else -8 * F.softplus(x - 4.6)
        )
    if design.beta:
        found["beta"] = design.beta * draw(design.heads).sigmoid()
    return found, draw(design.heads, design.value_dim)


def _draws(length: int, dtype: str) -> Callable[..., Tensor]:
    """``draw(*shape)`` gives normal numbers ``[1, time, *shape]``: the same ones for the same calls."""
    device = measure.device()
    random = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(1, length, *shape, generator=random, device=device).to(
        getattr(torch, dtype)
    )


def _features(design: LinearDesign, x: Tensor) -> Tensor:
    """Of queries or keys; those of normalised mixers make weights that are positive."""
    if design.feature_map == "hedgehog":
        return hedgehog(
            x,
            torch.eye(design.key_dim, dtype=x.dtype, device=x.device).expand(design.heads, -1, -1),
        )
    return MAPS[design.feature_map](x)
