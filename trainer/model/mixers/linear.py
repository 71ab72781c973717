"""Linear attention of every kind, as a mixer: a :class:`~longspan.trainer.recipe.layers.linear.LinearDesign` says which of its steps a
published model has.
"""

import copy

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Generator, Tensor, nn

from ....attention import apply_rotary
from ....attention.linear.attention import normalised
from ....attention.linear.feature_maps import MAPS, hedgehog
from ....parallel import Sequence, linear_attention, short_convolution
from ...recipe.layers.linear import LinearAttentionBlock
from ..norm import HeadsRMSNorm
from .decay import FixedDecay, SigmoidDecay, SoftplusDecay
from .mixer import Mixer, uniform

_GATES = {"sigmoid": torch.sigmoid, "silu": F.silu, "identity": lambda x: x}


class LinearAttention(Mixer):
    """Per key head the rows are its query, key and values, and if there are any gates, betas and decays of its values."""

    def __init__(
        self,
        config: TransformerConfig,
        block: LinearAttentionBlock,
        rope_theta: float,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ):
        design = block.design(config, layer_number - 1)
        super().__init__(config, pg_collection, design.key_heads, sum(design.parts), design.width)
        self.design, self.rope_theta = design, rope_theta
        heads = self.local_heads * design.group
        if design.conv_kernel:
            bound, channels = design.conv_kernel**-0.5, design.conv_channels // self.tp_group.size()
            self.conv_weight = self.per_head(uniform(-bound, bound), channels, design.conv_kernel)
            self.conv_bias = (
                self.per_head(uniform(-bound, bound), channels) if design.conv_bias else None
            )
        if design.feature_map == "hedgehog":
            self.map_q, self.map_k = (
                self.per_head(_identities, heads * design.key_dim, design.key_dim) for _ in "qk"
            )
        if design.feature_map == "lrpe":
            self.angles = self.per_head(_angles, self.local_heads, design.key_dim)
        decays = heads * (design.key_dim if design.decay_rank else 1)
        if design.decay_rank:
            self.decay_in = LowRank(
                config, design.decay_rank, design.heads * design.key_dim, pg_collection
            )
        if design.decay == "sigmoid":
            self.decay = SigmoidDecay(self, decays)
        elif design.decay == "softplus":
            # Gated DeltaNet alone lets rates begin near 0.
            self.decay = SoftplusDecay(
                self, heads, decays, 0.0 if design.beta and not design.decay_rank else 1.0
            )
        elif design.decay != "none":
            self.decay = FixedDecay(self, design, layer_number - 1, config.num_layers)
        if design.skip:
            self.skip = self.per_head(lambda shape, generator: torch.ones(shape), heads)
        if design.norm != "none":
            sizes = design.heads, design.value_dim, design.group
            self.norm = HeadsRMSNorm(
                config,
                design.norm,
                *sizes,
                config.layernorm_epsilon,
                self.tp_group,
                design.norm_weight,
            )
        if design.gate_rank:
            self.gate_in = LowRank(config, design.gate_rank, design.width, pg_collection)

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        inputs, v, gate = self.around(self._inputs, hidden, sequence)
        where = {
            "layout": sequence.layout,
            "group": self.cp_group,
            "documents": sequence.all_documents,
        }
        out = linear_attention(**inputs, **where, scale=self.design.scale)
        return self.around(self._result, out, v, gate, hidden)

    def _inputs(
        self, hidden: Tensor, sequence: Sequence
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """What the operation takes, the values before their steps, and the gates."""
        design = self.design
        where = {
            "layout": sequence.layout,
            "group": self.cp_group,
            "documents": sequence.all_documents,
        }
        mixed, gate, beta, decay = self.project(hidden).split(design.parts, dim=-1)
        gate, beta, decay = gate.flatten(2), beta.flatten(2), decay.flatten(2)
        if design.conv_kernel:
            convolved = short_convolution(
                mixed.flatten(2), self.conv_weight, self.conv_bias, **where
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
        v = v.unflatten(-1, (design.group, -1)).flatten(2, 3)
        q, k = self._features(q, k, sequence)

        inputs = {"q": q, "k": k, "v": v}
        if design.decay != "none":
            inputs["decay"], step = self._decay(hidden, decay)
            if design.steps:
                inputs["v"] = v * step[..., None].to(v.dtype)
        if design.beta:
            inputs["beta"] = design.beta * torch.sigmoid(beta)
        if design.normalised:
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
    """Two projections with few channels between them, which every tensor-parallel rank has whole."""

    def __init__(
        self,
        config: TransformerConfig,
        rank: int,
        width: int,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__()
        shared = {
            "bias": False,
            "skip_bias_add": True,
            "tp_group": pg_collection.tp,
            "init_method": config.init_method,
        }
        self.down = ColumnParallelLinear(
            config.hidden_size, rank, config=config, gather_output=True, **shared
        )
        whole = copy.copy(
            config
        )  # what is between them is no longer spread over the ranks along time
        whole.sequence_parallel = False
        self.up = ColumnParallelLinear(rank, width, config=whole, gather_output=False, **shared)

    def forward(self, hidden: Tensor) -> Tensor:
        """From ``[time, batch, hidden]`` to ``[batch, time, local width]``."""
        return self.up(self.down(hidden)[0])[0].transpose(0, 1)


def _identities(shape: list[int], generator: Generator) -> Tensor:
    """One below the other."""
    return torch.eye(shape[1]).repeat(shape[0] // shape[1], 1)


def _angles(shape: list[int], generator: Generator) -> Tensor:
    """``10000^(-2 i / n)`` over all heads' dims, as in TransNormerLLM's code."""
    count = shape[0] * shape[1]
    return (10000.0 ** (-2 * torch.arange(count) / count)).reshape(shape)
