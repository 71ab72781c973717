"""The module of softmax attention under any pattern."""

import torch
from torch import Tensor

from ...attention import apply_rotary
from ...attention.rotary import split_heads
from ...parallel import Sequence, attend
from ..megatron_core import TransformerConfig
from .base import MixerContext, Shapes
from .mixer import Mixer, zeros
from .norm import HeadsRMSNorm, RMSNorm
from .softmax_design import SoftmaxDesign


class SoftmaxAttention(Mixer):
    """Attention with grouped queries.

    The input projection has, for each KV head, the rows of its queries, of their gates if there are
    any, of its key and of its value.
    """

    def __init__(self, context: MixerContext, shapes: Shapes, design: SoftmaxDesign):
        super().__init__(context, shapes, design.num_kv_heads)
        self.design = design
        self.kv_schedule = context.kv_schedule
        self.pattern = design.pattern.from_head(self.first_head)
        self.num_gates = design.group if design.output_gate else 0
        self._add_qk_norms(context.config)
        self.sinks = self.split_parameter("sinks", zeros) if design.attention_sink else None

    def _add_qk_norms(self, config: TransformerConfig) -> None:
        design = self.design
        tp_group = self.tp_group
        if design.qk_norm == "all":
            dim = design.head_dim
            self.q_norm = HeadsRMSNorm(config, tp_group, "all", design.num_heads, dim)
            self.k_norm = HeadsRMSNorm(config, tp_group, "all", design.num_kv_heads, dim)
        elif design.qk_norm:
            if tp_group.size() > 1 and not config.qk_layernorm:
                raise ValueError(
                    "a block has qk_norm: set qk_layernorm in the TransformerConfig, "
                    "or its gradients are not summed"
                )
            # Megatron sums the gradients of parameters with these names over tensor-parallel ranks.
            self.q_layernorm = RMSNorm(config, design.head_dim, config.layernorm_epsilon)
            self.k_layernorm = RMSNorm(config, design.head_dim, config.layernorm_epsilon)

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
        """Return queries, keys and values, each ``[batch, time, local heads, head_dim]``, and the
        gates of the queries ``[batch, time, local KV heads, group or 0, head_dim]``.
        """
        design = self.design
        # [batch, time, local KV heads, heads per KV head, head_dim]
        projected = self.project(hidden).unflatten(-1, (-1, design.head_dim))
        tables = None
        if design.rotary_dim:
            tables = sequence.rotary(design.rotary_dim, self.rope_theta)
        if not design.qk_norm:
            q, gate, k, v = split_heads(projected, design.group, self.num_gates, tables)
            return q, k, v, gate

        q, gate, k, v = split_heads(projected, design.group, self.num_gates, None)
        if design.qk_norm == "all":
            q = self.q_norm(q).view_as(q)
            k = self.k_norm(k).view_as(k)
        else:
            q = self.q_layernorm(q)
            k = self.k_layernorm(k)
        if tables is not None:
            q = apply_rotary(q, *tables)
            k = apply_rotary(k, *tables)
        return q, k, v, gate

    def _result(self, out: Tensor, gate: Tensor) -> Tensor:
        if self.design.output_gate:
            out = out * torch.sigmoid(gate.flatten(2, 3))
        return self.output(out.flatten(2))
