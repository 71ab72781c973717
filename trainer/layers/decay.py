"""Log-decays as mixers have them: fixed, or made of the layer's input. All are computed in fp32 whatever the model's dtype.

Learned rates and biases are parameters of the model's dtype like all others, with fp32 master weights; the authors' code of
Mamba-2, Gated DeltaNet and KDA keeps these few in fp32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ...attention.linear import decays
from .linear import LinearDesign
from .mixer import Initial, Mixer, uniform, zeros

FIXED = {"minimax": decays.minimax, "paper": decays.lightning_paper, "retention": decays.retention}


class FixedDecay(nn.Module):
    """One per head, not trained."""

    def __init__(self, mixer: Mixer, design: LinearDesign):
        super().__init__()
        first, count = mixer.first_head * design.group, mixer.local_heads * design.group
        of_all_heads = FIXED[design.decay](design.heads, mixer.layer, mixer.config.num_layers)
        log = of_all_heads[first : first + count]
        self.register_buffer("log", log.to(mixer.linear_in.weight.device), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves with the model, but stays fp32 when the model is cast: in bf16 it would be another decay."""
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
        """``[..., channels]`` in and out."""
        return F.logsigmoid(x.float() + self.bias.float()) / 16


class SoftplusDecay(nn.Module):
    """``-exp(A) softplus(x + b)``: a rate per head times a step (Mamba-2, arXiv 2405.21060; Gated DeltaNet; KDA).

    First values are those of the authors' code: rates uniform between 1 and 16 (Gated DeltaNet: 0 and 16), steps
    log-uniform from 0.001 to 0.1.
    """

    def __init__(self, mixer: Mixer, least_rate: float):
        super().__init__()
        self.rate_log = mixer.split_parameter("decay.rate_log", _log_uniform_rate(least_rate))
        self.bias = mixer.split_parameter("decay.bias", _inverse_softplus_of_steps)

    def step(self, x: Tensor) -> Tensor:
        """``[..., channels]`` in and out."""
        return F.softplus(x.float() + self.bias.float())

    def rate(self) -> Tensor:
        """``[heads]``."""
        return self.rate_log.float().exp()


def _log_uniform_rate(least: float) -> Initial:
    draw = uniform(max(least, 0.01), 16.0)
    return lambda shape, generator: draw(shape, generator).log()


def _inverse_softplus_of_steps(shape: list[int], generator: Generator) -> Tensor:
    step = uniform(math.log(1e-3), math.log(1e-1))(shape, generator).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))
