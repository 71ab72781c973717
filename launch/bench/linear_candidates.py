"""What ``longspan bench linear`` measures: the call of each linear mixer, and dense attention."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.linear import decays
from ...attention.linear.attention import linear_attention, normalized
from ...attention.linear.feature_maps import MAPS, hedgehog
from ...trainer.layers.linear import LinearAttentionBlock, LinearDesign
from ...trainer.layers.registry import KINDS
from . import measure
from .measure import Comparison, ForwardBackward

BLOCKS = {block.kind(): block for block in KINDS if issubclass(block, LinearAttentionBlock)}
"""The layer kinds with linear attention, by the name of their mixer."""
CHECKED_TOKENS = 600
"""Tokens that are checked at most, as the reference goes token by token.

They are more than a segment of a backend, and no whole number of chunks.
"""


@dataclass(frozen=True)
class AttentionWidth:
    """The width of all candidates, and the dtype of their tensors."""

    heads: int
    head_dim: int
    dtype: str

    def design(self, mixer: str) -> LinearDesign:
        """Return the mixer's preset in a model of this width; raises ValueError if it has none."""
        model = SimpleNamespace(num_attention_heads=self.heads, kv_channels=self.head_dim)
        return BLOCKS[mixer].model_validate({"mixer": mixer}).design(model)


def linear_call(width: AttentionWidth, mixer: str, backend: str, length: int) -> ForwardBackward:
    """Return the mixer's operation on tensors of its own shapes.

    Every tensor that the mixer makes from its input has a gradient.
    """
    design = width.design(mixer)
    inputs, grad_out = _tensors(design, length, width.dtype)
    operation = _operation(design, inputs, backend)
    return measure.forward_backward(operation, list(inputs.values()), grad_out)


def dense_call(width: AttentionWidth, length: int) -> ForwardBackward:
    """Return causal softmax attention on ``[1, heads, time, head_dim]``."""
    draw = _random_tensors(length, width.dtype)
    *inputs, grad_out = (
        draw(width.heads, width.head_dim).transpose(1, 2).contiguous() for _ in range(4)
    )
    return measure.forward_backward(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs, grad_out
    )


def linear_fault(width: AttentionWidth, mixer: str, backend: str, length: int) -> str | None:
    """Return what is wrong with the output or a gradient, if anything.

    They are compared with the recurrence in fp64 on the same numbers, over at most
    :data:`CHECKED_TOKENS`.
    """
    design = width.design(mixer)
    inputs, grad_out = _tensors(design, min(length, CHECKED_TOKENS), width.dtype)
    exact = {name: x.double() for name, x in inputs.items()}

    operation = _operation(design, inputs, backend)
    results = measure.forward_backward(operation, list(inputs.values()), grad_out)()
    reference = _operation(design, exact, "reference")
    expected = measure.forward_backward(reference, list(exact.values()), grad_out.double())()

    names = ["output", *(f"gradient of {name}" for name in inputs)]
    comparisons = (
        Comparison(name, _with_dims(result), _with_dims(right))
        for name, result, right in zip(names, results, expected, strict=True)
    )
    return measure.first_fault(comparisons, width.dtype)


def _with_dims(x: Tensor) -> Tensor:
    """Return it as ``[batch, time, heads, dim]``: decays and betas may have no dims."""
    return x if x.ndim == 4 else x[..., None]


def tensor_bytes(width: AttentionWidth, mixer: str | None, length: int) -> int:
    """Return the bytes of the inputs, the output and their gradients.

    Args:
        width: of the candidate.
        mixer: its name, or None for dense attention.
        length: in tokens.
    """
    if mixer is None:
        itemsize = getattr(torch, width.dtype).itemsize
        return 2 * 4 * width.heads * width.head_dim * length * itemsize
    inputs, grad_out = _tensors(width.design(mixer), 1, width.dtype)
    return 2 * length * sum(x.nbytes for x in (*inputs.values(), grad_out))


class Gates(TypedDict, total=False):
    """Arguments of ``linear_attention`` that not all mixers have."""

    decay: Tensor
    beta: Tensor


def _operation(design: LinearDesign, names: Iterable[str], backend: str) -> Callable[..., Tensor]:
    """Return the mixer's operation as a function of the tensors ``names``, in this order."""
    names = list(names)
    fixed = {}
    if _has_fixed_decay(design):
        fixed["decay"] = decays.minimax(design.heads, 0, 2).to(measure.device())

    def operation(*tensors: Tensor) -> Tensor:
        arguments = dict(zip(names, tensors, strict=True)) | fixed
        v = arguments["v"]
        if design.normalised:
            # A column of ones becomes the sum of the weights.
            v = F.pad(v, (0, 1), value=1.0)
        gates: Gates = {}
        if "decay" in arguments:
            gates["decay"] = arguments["decay"]
        if "beta" in arguments:
            gates["beta"] = arguments["beta"]

        out = linear_attention(
            arguments["q"], arguments["k"], v, scale=design.scale, backend=backend, **gates
        )
        assert isinstance(out, Tensor)  # a tuple only with return_state
        return normalized(out) if design.normalised else out

    return operation


def _has_fixed_decay(design: LinearDesign) -> bool:
    return design.decay not in ("none", "sigmoid", "softplus")


def _tensors(design: LinearDesign, length: int, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs, by argument of ``linear_attention``, and the output's gradient."""
    draw = _random_tensors(length, dtype)
    inputs = {name: _features(design, draw(design.key_heads, design.key_dim)) for name in "qk"}
    inputs["v"] = draw(design.heads, design.value_dim)

    if design.decay != "none" and not _has_fixed_decay(design):
        dims = [design.key_dim] if design.decay_rank else []
        x = draw(design.heads, *dims).float()
        # As large as those that the mixers begin with: weak, or rates up to 16 times steps of about
        # 0.01.
        if design.decay == "sigmoid":
            inputs["decay"] = F.logsigmoid(x) / 16
        else:
            inputs["decay"] = -8 * F.softplus(x - 4.6)
    if design.beta:
        inputs["beta"] = design.beta * draw(design.heads).sigmoid()

    grad_out = draw(design.heads, design.value_dim)
    return inputs, grad_out


def _random_tensors(length: int, dtype: str) -> Callable[..., Tensor]:
    """Return ``draw(*shape)``: normal numbers ``[1, time, *shape]``, the same at every run."""
    device = measure.device()
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(1, length, *shape, generator=generator, device=device)
        return numbers.to(getattr(torch, dtype))

    return draw


def _features(design: LinearDesign, x: Tensor) -> Tensor:
    """Return the features of queries or keys; those of normalised mixers give positive weights."""
    if design.feature_map == "hedgehog":
        identity = torch.eye(design.key_dim, dtype=x.dtype, device=x.device)
        return hedgehog(x, identity.expand(design.heads, -1, -1))
    return MAPS[design.feature_map](x)
