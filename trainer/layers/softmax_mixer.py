"""Softmax attention under any pattern, as a mixer."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ...attention import apply_rotary
from ...parallel import Sequence, attend
from .mixer import Mixer, MixerOptions, zeros
from .norm import HeadsRMSNorm, RMSNorm
from .softmax import SoftmaxBlock


class SoftmaxAttention(Mixer):
    """Attention with grouped queries; per KV head the rows are its queries, their gates, its key and its value."""

    def __init__(
        self,
        config: TransformerConfig,
        block: SoftmaxBlock,
        options: MixerOptions,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ):
        num_kv_heads = config.num_query_groups
        super().__init__(config, block, options, layer_number, pg_collection, num_kv_heads)
        self.block, self.schedule = block, options.schedule
        self.head_dim = config.kv_channels
        self.rotary_dim = int(self.head_dim * block.rotary_fraction)
        self.pattern = block.attention_pattern(num_kv_heads).from_head(self.first_head)
        group = config.num_attention_heads // num_kv_heads
        self.rows_per_kv_head = [group, group if block.output_gate else 0, 1, 1]
        self._add_qk_norms(config)
        self.sinks = self.split_parameter("sinks", zeros) if block.attention_sink else None

    def _add_qk_norms(self, config: TransformerConfig) -> None:
        eps = config.layernorm_epsilon
        if self.block.qk_norm == "all":
            for name, num_heads in (
                ("q_norm", config.num_attention_heads),
                ("k_norm", config.num_query_groups),
            ):
                norm = HeadsRMSNorm(config, "all", num_heads, self.head_dim, 1, eps, self.tp_group)
                self.add_module(name, norm)
        elif self.block.qk_norm:
            if self.tp_group.size() > 1 and not config.qk_layernorm:
                raise ValueError(
                    "a block has qk_norm: set qk_layernorm in the TransformerConfig, or its gradients are not summed"
                )
            # By these names Megatron knows to sum their gradients over the ranks' heads.
            self.q_layernorm = RMSNorm(config, self.head_dim, eps)
            self.k_layernorm = RMSNorm(config, self.head_dim, eps)

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        q, k, v, gate = self.around(self._inputs, hidden, sequence)
        out = attend(
            q,
            k,
            v,
            self.pattern,
            **self.tokens_of(sequence),
            sinks=self.sinks,
            softcap=self.block.softcap,
            schedule=self.schedule,
        )
        return self.around(self._result, out, gate)

    def _inputs(self, hidden: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[batch, time, local heads, head_dim]``, and the gates of the queries."""
        rows = self.project(hidden).unflatten(-1, (-1, self.head_dim))
        q, gate, k, v = rows.split(self.rows_per_kv_head, dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
        if self.block.qk_norm == "all":
            q, k = self.q_norm(q).view_as(q), self.k_norm(k).view_as(k)
        elif self.block.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if self.rotary_dim:
            tables = sequence.rotary(self.rotary_dim, self.rope_theta)
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        return q, k, v, gate

    def _result(self, out: Tensor, gate: Tensor) -> Tensor:
        if self.block.output_gate:
            out = out * torch.sigmoid(gate.flatten(2, 3))
        return self.output(out.flatten(2))
