"""Softmax attention under any pattern, as a mixer."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ....attention import apply_rotary
from ....parallel import Sequence, attend
from ...recipe.layers.softmax import SoftmaxBlock
from ..norm import HeadsRMSNorm, RMSNorm
from .mixer import Mixer, zeros


class SoftmaxAttention(Mixer):
    """Attention with grouped queries; per KV head the rows are its queries, their gates, its key and its value."""

    def __init__(
        self,
        config: TransformerConfig,
        block: SoftmaxBlock,
        rope_theta: float,
        schedule: str,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ):
        self.group = config.num_attention_heads // config.num_query_groups
        self.parts = [self.group, self.group if block.output_gate else 0, 1, 1]
        self.head_dim = config.kv_channels
        rows, width = (
            sum(self.parts) * config.kv_channels,
            config.num_attention_heads * config.kv_channels,
        )
        super().__init__(config, pg_collection, config.num_query_groups, rows, width)
        self.block, self.schedule = block, schedule
        self.rotary_dim, self.rope_theta = int(self.head_dim * block.rotary_fraction), rope_theta
        self.pattern = block.attention_pattern(config.num_query_groups).from_head(self.first_head)
        if block.qk_norm is True and pg_collection.tp.size() > 1 and not config.qk_layernorm:
            raise ValueError(
                "a block has qk_norm: set qk_layernorm in the TransformerConfig, or its gradients are not summed"
            )
        if block.qk_norm == "all":
            sizes = self.head_dim, 1, config.layernorm_epsilon, self.tp_group
            self.q_norm = HeadsRMSNorm(config, "all", config.num_attention_heads, *sizes)
            self.k_norm = HeadsRMSNorm(config, "all", config.num_query_groups, *sizes)
        elif block.qk_norm:  # these names ask Megatron to sum their gradients over the ranks' heads
            self.q_layernorm = RMSNorm(config, self.head_dim, config.layernorm_epsilon)
            self.k_layernorm = RMSNorm(config, self.head_dim, config.layernorm_epsilon)
        self.sinks = (
            self.per_head(zeros, self.local_heads * self.group) if block.attention_sink else None
        )

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        q, k, v, gate = self.around(self._inputs, hidden, sequence)
        options = {"sinks": self.sinks, "softcap": self.block.softcap, "schedule": self.schedule}
        out = attend(
            q,
            k,
            v,
            self.pattern,
            sequence.layout,
            self.cp_group,
            documents=sequence.all_documents,
            **options,
        )
        return self.around(self._result, out, gate)

    def _inputs(self, hidden: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, and the gates of the queries."""
        rows = self.project(hidden).unflatten(-1, (-1, self.head_dim))
        q, gate, k, v = rows.split(self.parts, dim=-2)
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
