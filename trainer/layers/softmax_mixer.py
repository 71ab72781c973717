"""Softmax attention under any pattern, as a mixer."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ...attention import apply_rotary
from ...parallel import Sequence, attend
from .base import MixerContext, Shapes
from .mixer import Mixer, zeros
from .norm import HeadsRMSNorm, RMSNorm
from .softmax_design import SoftmaxDesign


class SoftmaxAttention(Mixer):
    """Attention with grouped queries; per KV head the rows are its queries, their gates, its key and its value."""

    def __init__(self, context: MixerContext, shapes: Shapes, design: SoftmaxDesign):
        super().__init__(context, shapes, design.num_kv_heads)
        self.design, self.kv_schedule = design, context.kv_schedule
        self.pattern = design.pattern.from_head(self.first_head)
        gates = design.group if design.output_gate else 0
        self.rows_per_kv_head = [design.group, gates, 1, 1]
        self._add_qk_norms(context.config)
        self.sinks = self.split_parameter("sinks", zeros) if design.attention_sink else None

    def _add_qk_norms(self, config: TransformerConfig) -> None:
        design, eps = self.design, config.layernorm_epsilon
        if design.qk_norm == "all":
            sizes = design.head_dim, 1, eps, self.tp_group
            self.q_norm = HeadsRMSNorm(config, "all", design.num_heads, *sizes)
            self.k_norm = HeadsRMSNorm(config, "all", design.num_kv_heads, *sizes)
        elif design.qk_norm:
            if self.tp_group.size() > 1 and not config.qk_layernorm:
                raise ValueError(
                    "a block has qk_norm: set qk_layernorm in the TransformerConfig, or its gradients are not summed"
                )
            # By these names Megatron knows to sum their gradients over the ranks' heads.
            self.q_layernorm = RMSNorm(config, design.head_dim, eps)
            self.k_layernorm = RMSNorm(config, design.head_dim, eps)

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        q, k, v, gate = self.around(self._inputs, hidden, sequence)
        out = attend(
            q,
            k,
            v,
            self.pattern,
            **self.tokens_of(sequence),
            sinks=self.sinks,
            softcap=self.design.softcap,
            schedule=self.kv_schedule,
        )
        return self.around(self._result, out, gate)

    def _inputs(self, hidden: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[batch, time, local heads, head_dim]``, and the gates of the queries."""
        rows = self.project(hidden).unflatten(-1, (-1, self.design.head_dim))
        q, gate, k, v = rows.split(self.rows_per_kv_head, dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
        if self.design.qk_norm == "all":
            q, k = self.q_norm(q).view_as(q), self.k_norm(k).view_as(k)
        elif self.design.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if self.design.rotary_dim:
            tables = sequence.rotary(self.design.rotary_dim, self.rope_theta)
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        return q, k, v, gate

    def _result(self, out: Tensor, gate: Tensor) -> Tensor:
        if self.design.output_gate:
            out = out * torch.sigmoid(gate.flatten(2, 3))
        return self.output(out.flatten(2))
