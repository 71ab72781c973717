"""The gated MLP of a layer (arXiv 2002.05202), and the activation between its two matrices."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...attention.arguments import has_kernels
from ..megatron_core import MLP, SharedExpertMLP

Activation = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The activation of a gate that has none."""
    return x


def gated_activation(x: Tensor, activation: Activation, weights: Tensor | None = None) -> Tensor:
    """Return ``activation(gate) * up`` of ``x = [gate, up]``, times a weight for each token.

    On CUDA one kernel computes it in fp32, and one its gradients.

    Args:
        x: ``[..., 2 * width]``.
        activation: ``F.silu`` or :func:`identity`; any other is computed by torch.
        weights: ``[...]``; None for ones.

    Returns:
        ``[..., width]``, of the dtype of ``x``.
    """
    if activation in (F.silu, identity) and has_kernels(x):
        from .gated_triton import fused_gated_activation

        return fused_gated_activation(x, activation is F.silu, weights)

    gate, up = x.chunk(2, -1)
    out = activation(gate) * up
    return out if weights is None else (out * weights[..., None]).to(x.dtype)


class GatedMLP(MLP):
    """Megatron's MLP with :func:`gated_activation`.

    Megatron's own is either unfused or compiled by Inductor at the first step. It still computes
    what the config of another model may ask for: biases, or no gate.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Compute ``[..., hidden]``, and None for the bias that Megatron's MLP may have."""
        if self.config.add_bias_linear or not self.config.gated_linear_unit:
            return super().forward(hidden_states)
        x, _ = self.linear_fc1(hidden_states)
        out, _ = self.linear_fc2(gated_activation(x, self.config.activation_func))
        return out, None


class SharedExpert(SharedExpertMLP, GatedMLP):
    """Megatron's shared expert, which computes as :class:`GatedMLP` does."""
