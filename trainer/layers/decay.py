"""Log-decays of linear attention: fixed, or computed from the layer's input. All are fp32, whatever
the model's dtype.

Learned rates and biases are parameters of the model's dtype like all others, with fp32 master
weights; the authors' code of Mamba-2, Gated DeltaNet and KDA keeps these few in fp32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ...attention.linear import decays
from .linear_design import LinearDesign
from .mixer import InitialValues, Mixer, uniform, zeros

FIXED = {"minimax": decays.minimax, "paper": decays.lightning_paper, "retention": decays.retention}
"""Functions ``(heads, layer, layers) -> [heads]``, by the names that :class:`LinearDesign` has."""


class FixedDecay(nn.Module):
    """One log-decay per head, which is not trained."""

    log: Tensor
    """fp32 ``[local heads]``."""

    def __init__(self, mixer: Mixer, design: LinearDesign, layer: int, num_layers: int):
        super().__init__()
        log_decay = FIXED[design.decay](design.heads, layer, num_layers)
        start = mixer.first_head * design.group
        stop = start + mixer.local_heads * design.group
        local = log_decay[start:stop].to(mixer.linear_in.weight.device)
        self.register_buffer("log", local, persistent=False)

    def _apply(self, fn, recurse=True):
        """Move with the model, but stay fp32 if it is cast: bf16 would be another decay."""
        log = self.log
        super()._apply(fn, recurse)
        self.log = log.to(self.log.device)
        return self


class SigmoidDecay(nn.Module):
    """``logsigmoid(x + b) / 16`` (GLA, arXiv 2312.06635 sec. 4.4)."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.bias = mixer.split_parameter("decay.bias", zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-decays of ``[..., channels]``, in the same shape."""
        return F.logsigmoid(x.float() + self.bias.float()) / 16


class SoftplusDecay(nn.Module):
    """``-exp(A) softplus(x + b)``: a rate per head times a step (Mamba-2, arXiv 2405.21060; Gated
    DeltaNet; KDA).

    Initial values are those of the authors' code: rates uniform between 1 and 16 (Gated DeltaNet: 0
    and 16), steps log-uniform from 0.001 to 0.1.
    """

    def __init__(self, mixer: Mixer, least_rate: float):
        super().__init__()
        self.rate_log = mixer.split_parameter("decay.rate_log", _log_of_uniform_rate(least_rate))
        self.bias = mixer.split_parameter("decay.bias", _inverse_softplus_of_step)

    def step(self, x: Tensor) -> Tensor:
        """Return the steps of ``[..., channels]``, in the same shape."""
        return F.softplus(x.float() + self.bias.float())

    def rate(self) -> Tensor:
        """Return the rate of each of this rank's heads: ``[local heads]``."""
        return self.rate_log.float().exp()


def _log_of_uniform_rate(least: float) -> InitialValues:
    rate = uniform(max(least, 0.01), 16.0)
    return lambda shape, generator: rate(shape, generator).log()


def _inverse_softplus_of_step(shape: list[int], generator: Generator) -> Tensor:
    step = uniform(math.log(1e-3), math.log(1e-1))(shape, generator).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))
