"""Linear attention of every kind, as a mixer: a :class:`.linear.LinearDesign` says which of its steps a published model has."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Generator, Tensor, nn

from ...attention import apply_rotary
from ...attention.linear.attention import normalised
from ...attention.linear.feature_maps import MAPS, hedgehog
from ...parallel import Sequence, linear_attention, short_convolution
from .base import Shapes
from .decay import FixedDecay, SigmoidDecay, SoftplusDecay
from .linear import LinearAttentionBlock
from .mixer import MegatronSizes, Mixer, MixerOptions, conv1d_uniform
from .norm import HeadsRMSNorm

_GATES = {"sigmoid": torch.sigmoid, "silu": F.silu, "identity": lambda x: x}


class LinearAttention(Mixer):
    """Per key head the rows are its query, key and values, and if there are any gates, betas and decays of its values."""

    def __init__(
        self,
        config: TransformerConfig,
        block: LinearAttentionBlock,
        options: MixerOptions,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ):
        design = block.design(MegatronSizes.of(config), layer_number - 1)
        super().__init__(config, block, options, layer_number, pg_collection, design.key_heads)
        self.design = design
        if design.conv_kernel:
            initial = conv1d_uniform(design.conv_kernel)
            self.conv_weight = self.split_parameter("conv_weight", initial)
            self.conv_bias = (
                self.split_parameter("conv_bias", initial) if design.conv_bias else None
            )
        if design.feature_map == "hedgehog":
            self.map_q = self.split_parameter("map_q", _identities)
            self.map_k = self.split_parameter("map_k", _identities)
        if design.feature_map == "lrpe":
            self.angles = self.split_parameter("angles", _angles)
        self._add_decay(config)
        if design.skip:
            self.skip = self.split_parameter("skip", _ones)
        if design.norm != "none":
            self.norm = HeadsRMSNorm(
                config,
                design.norm,
                design.heads,
                design.value_dim,
                design.group,
                config.layernorm_epsilon,
                self.tp_group,
                design.norm_weight,
            )
        if design.gate_rank:
            self.gate_in = LowRank(config, self.shapes, "gate_in", self.tp_group)

    def _add_decay(self, config: TransformerConfig) -> None:
        design = self.design
        if design.decay_rank:
            self.decay_in = LowRank(config, self.shapes, "decay_in", self.tp_group)
        if design.decay == "sigmoid":
            self.decay = SigmoidDecay(self)
        elif design.decay == "softplus":
            gated_deltanet = design.beta and not design.decay_rank
            self.decay = SoftplusDecay(self, least_rate=0.0 if gated_deltanet else 1.0)
        elif design.decay != "none":
            self.decay = FixedDecay(self, design)

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        inputs, v, gate = self.around(self._inputs, hidden, sequence)
        out = linear_attention(**inputs, **self.tokens_of(sequence), scale=self.design.scale)
        return self.around(self._result, out, v, gate, hidden)

    def _inputs(
        self, hidden: Tensor, sequence: Sequence
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """What the operation takes, the values before their steps, and the gates."""
        design = self.design
        # [batch, time, local key heads, rows] each, then gates, betas and decays [batch, time, all their rows]
        mixed, gate, beta, decay = self.project(hidden).split(design.parts, dim=-1)
        gate, beta, decay = gate.flatten(2), beta.flatten(2), decay.flatten(2)
        if design.conv_kernel:
            convolved = short_convolution(
                mixed.flatten(2), self.conv_weight, self.conv_bias, **self.tokens_of(sequence)
            )
            mixed = F.silu(convolved).view_as(mixed)
        q, k, v = mixed.split(
            [design.key_dim, design.key_dim, design.group * design.value_dim], dim=-1
        )
        if not design.conv_kernel:
            q, k, v = (
                F.silu(x) if name in design.silu else x
                for name, x in zip("qkv", (q, k, v), strict=True)
            )
        v = v.unflatten(-1, (design.group, -1)).flatten(2, 3)  # [batch, time, local heads, dim]
        q, k = self._features(q, k, sequence)

        inputs = {"q": q, "k": k, "v": v}
        if design.decay != "none":
            inputs["decay"], step = self._decay(hidden, decay)
            if step is not None and design.steps:
                inputs["v"] = v * step[..., None].to(v.dtype)
        if design.beta:
            inputs["beta"] = design.beta * torch.sigmoid(beta)
        if design.normalised:  # a column of ones sums the weights
            inputs["v"] = F.pad(inputs["v"], (0, 1), value=1.0)
        return inputs, v, gate

    def _result(self, out: Tensor, v: Tensor, gate: Tensor, hidden: Tensor) -> Tensor:
        design = self.design
        if design.normalised:
            out = normalised(out)
        if design.skip:
            out = out + v * self.skip[:, None].to(v.dtype)
        if design.gate_rank:
            gate = self.gate_in(hidden)
        return self.output(self._gated_norm(out, gate))

    def _features(self, q: Tensor, k: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """``[batch, time, local key heads, feature_dim]``."""
        design = self.design
        if design.rotary:
            tables = sequence.rotary(design.key_dim, self.rope_theta)
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        if design.feature_map == "hedgehog":
            sizes = q.shape[2], design.key_dim, design.key_dim
            return hedgehog(q, self.map_q.view(sizes)), hedgehog(k, self.map_k.view(sizes))
        if design.feature_map == "lrpe":  # the angle between two tokens is that of their distance
            angles = sequence.positions[..., None, None] * self.angles.float()
            turns = torch.cat([angles.cos(), angles.sin()], -1).to(q.dtype)
            return q.repeat(1, 1, 1, 2) * turns, k.repeat(1, 1, 1, 2) * turns
        return MAPS[design.feature_map](q), MAPS[design.feature_map](k)

    def _decay(self, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-decays, as linear attention takes them, and the steps ``[batch, time, local heads]`` where they have any."""
        if isinstance(self.decay, FixedDecay):
            return self.decay.log, None
        if self.design.decay_rank:
            x = self.decay_in(hidden)
        heads = (-1, self.design.key_dim) if self.design.decay_rank else (-1,)
        if isinstance(self.decay, SigmoidDecay):
            return self.decay(x).unflatten(2, heads), None
        step = self.decay.step(x).unflatten(2, heads)
        rate = self.decay.rate()
        return -step * (rate[:, None] if self.design.decay_rank else rate), step

    def _gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        """From ``[batch, time, local heads, value_dim]`` to ``[batch, time, local width]``."""
        design, gated = self.design, self.design.gate != "none"
        if gated and design.gate_first:
            out = out * _GATES[design.gate](gate).view_as(out)
        out = self.norm(out) if design.norm != "none" else out.flatten(2)
        return out * _GATES[design.gate](gate) if gated and not design.gate_first else out


class LowRank(nn.Module):
    """Two projections with few channels between them, which every tensor-parallel rank has whole.

    Args:
        shapes: of the mixer's parameters, where those of this module begin with ``name``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shapes: Shapes,
        name: str,
        tp_group: torch.distributed.ProcessGroup,
    ):
        super().__init__()
        rank, hidden_size = shapes[f"{name}.down.weight"]
        width, _ = shapes[f"{name}.up.weight"]
        shared: dict[str, Any] = {
            "bias": False,
            "skip_bias_add": True,
            "tp_group": tp_group,
            "init_method": config.init_method,
        }
        self.down = ColumnParallelLinear(
            hidden_size, rank, config=config, gather_output=True, **shared
        )
        # What is between them is no longer spread over the ranks along time.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        self.up = ColumnParallelLinear(rank, width, config=whole, gather_output=False, **shared)

    def forward(self, hidden: Tensor) -> Tensor:
        """From ``[time, batch, hidden]`` to ``[batch, time, local width]``."""
        return self.up(self.down(hidden)[0])[0].transpose(0, 1)


def _ones(shape: list[int], generator: Generator) -> Tensor:
    return torch.ones(shape)


def _identities(shape: list[int], generator: Generator) -> Tensor:
    """One below the other."""
    return torch.eye(shape[1]).repeat(shape[0] // shape[1], 1)


def _angles(shape: list[int], generator: Generator) -> Tensor:
    """``10000^(-2 i / n)`` over all heads' dims, as in TransNormerLLM's code."""
    count = shape[0] * shape[1]
    return (10000.0 ** (-2 * torch.arange(count) / count)).reshape(shape)
