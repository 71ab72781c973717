"""The module of every kind of linear attention: a :class:`.linear_design.LinearDesign` says which
of its steps a published model has.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ...attention import apply_rotary
from ...attention.linear.attention import normalized
from ...attention.linear.feature_maps import MAPS, hedgehog
from ...attention.rotary import angle_tables
from ...parallel import Sequence, linear_attention, short_convolution
from ..megatron_core import ColumnParallelLinear, TransformerConfig
from .base import MixerContext, Shapes
from .decay import FixedDecay, SigmoidDecay, SoftplusDecay
from .linear_design import LinearDesign
from .mixer import Mixer, conv1d_uniform, ones
from .norm import HeadsRMSNorm

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "identity": lambda x: x,
}


class LinearAttention(Mixer):
    """Linear attention.

    The input projection has, for each key head, the rows of its query, its key and its values, and
    if there are any those of the gates, betas and decays of its values.
    """

    def __init__(self, context: MixerContext, design: LinearDesign):
        shapes = design.parameter_shapes(context.sizes.hidden_size)
        super().__init__(context, shapes, design.key_heads)
        self.design = design
        if design.conv_kernel:
            initial = conv1d_uniform(design.conv_kernel)
            self.conv_weight = self.split_parameter("conv_weight", initial)
            has_bias = design.conv_bias
            self.conv_bias = self.split_parameter("conv_bias", initial) if has_bias else None
        if design.feature_map == "hedgehog":
            self.map_q = self.split_parameter("map_q", _identities)
            self.map_k = self.split_parameter("map_k", _identities)
        if design.feature_map == "lrpe":
            self.angles = self.split_parameter("angles", _angles)
        self._add_decay(context)
        if design.skip:
            self.skip = self.split_parameter("skip", ones)
        if design.norm != "none":
            self.norm = HeadsRMSNorm(
                context.config,
                self.tp_group,
                design.norm,
                design.heads,
                design.value_dim,
                design.group,
                design.norm_weight,
            )
        if design.gate_rank:
            self.gate_in = LowRank(context.config, shapes, "gate_in", self.tp_group)

    def _add_decay(self, context: MixerContext) -> None:
        design = self.design
        if design.decay_rank:
            self.decay_in = LowRank(context.config, self.shapes, "decay_in", self.tp_group)
        self.decay: FixedDecay | SigmoidDecay | SoftplusDecay
        if design.decay == "sigmoid":
            self.decay = SigmoidDecay(self)
        elif design.decay == "softplus":
            is_gated_deltanet = design.beta and not design.decay_rank
            self.decay = SoftplusDecay(self, least_rate=0.0 if is_gated_deltanet else 1.0)
        elif design.decay != "none":
            self.decay = FixedDecay(self, design, context.layer, context.sizes.num_hidden_layers)

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        inputs, values, gate = self.around(self._inputs, hidden, sequence)
        out = linear_attention(**inputs, **self.tokens_of(sequence), scale=self.design.scale)
        return self.around(self._result, out, values, gate, hidden)

    def _inputs(
        self, hidden: Tensor, sequence: Sequence
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the tensors of the operation, the values before they are multiplied by steps, and
        the gates.
        """
        design = self.design
        projected = self.project(hidden)  # [batch, time, local key heads, rows]
        mixed, gate, beta, decay = projected.split(design.parts, dim=-1)
        gate = gate.flatten(2)
        beta = beta.flatten(2)
        decay = decay.flatten(2)
        q, k, values = self._queries_keys_values(mixed, sequence)
        q, k = self._features(q, k, sequence)

        inputs = {"q": q, "k": k, "v": values}
        if design.decay != "none":
            inputs["decay"], step = self._log_decay(hidden, decay)
            if step is not None and design.steps:
                inputs["v"] = values * step[..., None].to(values.dtype)
        if design.beta:
            inputs["beta"] = design.beta * torch.sigmoid(beta)
        if design.normalised:
            # A column of ones, whose output is the sum of the weights.
            inputs["v"] = F.pad(inputs["v"], (0, 1), value=1.0)
        return inputs, values, gate

    def _queries_keys_values(
        self, mixed: Tensor, sequence: Sequence
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve, and split ``[batch, time, local key heads, rows]``.

        Returns:
            Queries and keys ``[batch, time, local key heads, key_dim]``, values ``[batch, time,
            local heads, value_dim]``.
        """
        design = self.design
        if design.conv_kernel:
            tokens = self.tokens_of(sequence)
            channels = mixed.flatten(2)
            convolved = short_convolution(channels, self.conv_weight, self.conv_bias, **tokens)
            mixed = F.silu(convolved).view_as(mixed)
        dims = [design.key_dim, design.key_dim, design.group * design.value_dim]
        q, k, v = mixed.split(dims, dim=-1)
        if not design.conv_kernel:
            q = F.silu(q) if "q" in design.silu else q
            k = F.silu(k) if "k" in design.silu else k
            v = F.silu(v) if "v" in design.silu else v
        return q, k, v.unflatten(-1, (design.group, -1)).flatten(2, 3)

    def _features(self, q: Tensor, k: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """Return the features of both: ``[batch, time, local key heads, feature_dim]``."""
        design = self.design
        if design.rotary:
            tables = sequence.rotary(design.key_dim, self.rope_theta)
            q = apply_rotary(q, *tables)
            k = apply_rotary(k, *tables)
        if design.feature_map == "hedgehog":
            sizes = q.shape[2], design.key_dim, design.key_dim
            return hedgehog(q, self.map_q.view(sizes)), hedgehog(k, self.map_k.view(sizes))
        if design.feature_map == "lrpe":
            # The angle between two tokens is that of their distance.
            tables = angle_tables(sequence.positions[..., None, None], self.angles)
            rotation = torch.cat(tables, -1).to(q.dtype)
            return q.repeat(1, 1, 1, 2) * rotation, k.repeat(1, 1, 1, 2) * rotation
        feature_map = MAPS[design.feature_map]
        return feature_map(q), feature_map(k)

    def _log_decay(self, hidden: Tensor, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-decays as linear attention accepts them, and the steps ``[batch, time,
        local heads]`` of decays that have any.
        """
        if isinstance(self.decay, FixedDecay):
            return self.decay.log, None
        per_key = self.design.decay_rank > 0
        x = self.decay_in(hidden) if per_key else projected
        heads = (-1, self.design.key_dim) if per_key else (-1,)
        if isinstance(self.decay, SigmoidDecay):
            return self.decay(x).unflatten(2, heads), None
        step = self.decay.step(x).unflatten(2, heads)
        rate = self.decay.rate()
        return -step * (rate[:, None] if per_key else rate), step

    def _result(self, out: Tensor, values: Tensor, gate: Tensor, hidden: Tensor) -> Tensor:
        design = self.design
        if design.normalised:
            out = normalized(out)
        if design.skip:
            out = out + values * self.skip[:, None].to(values.dtype)
        if design.gate_rank:
            gate = self.gate_in(hidden)
        return self.output(self._gated_norm(out, gate))

    def _gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        """Gate and norm ``[batch, time, local heads, value_dim]``.

        Returns:
            ``[batch, time, local heads * value_dim]``.
        """
        design = self.design
        if design.gate == "none":
            return self._normed(out)
        if design.gate_first:
            return self._normed(out * _GATES[design.gate](gate).view_as(out))
        return self._normed(out) * _GATES[design.gate](gate)

    def _normed(self, out: Tensor) -> Tensor:
        return out.flatten(2) if self.design.norm == "none" else self.norm(out)


class LowRank(nn.Module):
    """Two projections with few channels between them, which every tensor-parallel rank has whole.

    Args:
        shapes: shapes of the mixer's parameters, where those of this module begin with ``name``.
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
        # Between the two, tokens are no longer spread over tensor-parallel ranks.
        whole_tokens = copy.copy(config)
        whole_tokens.sequence_parallel = False
        self.up = ColumnParallelLinear(
            rank, width, config=whole_tokens, gather_output=False, **shared
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Project ``[time, batch, hidden]`` to ``[batch, time, local width]``."""
        narrow, _ = self.down(hidden)
        wide, _ = self.up(narrow)
        return wide.transpose(0, 1)


def _identities(shape: list[int], generator: Generator) -> Tensor:
    """Return an identity matrix for every head, stacked along the first dim."""
    return torch.eye(shape[1]).repeat(shape[0] // shape[1], 1)


def _angles(shape: list[int], generator: Generator) -> Tensor:
    """Return ``10000^(-2 i / n)`` over all heads' dims, as in TransNormerLLM's code."""
    count = shape[0] * shape[1]
    return (10000.0 ** (-2 * torch.arange(count) / count)).reshape(shape)
