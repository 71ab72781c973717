"""The token-mixing half of a layer: projections around :mod:`longspan.parallel`'s operations, for Megatron-core.

Fused projections are laid out head by head, so that a tensor-parallel rank's rows are one slice of the whole matrix.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from ..attention import apply_rotary
from ..parallel import Sequence, attend, linear_attention
from .norm import RMSNorm, ShardedRMSNorm
from .recipe import LightningBlock, SoftmaxBlock


class Mixer(MegatronModule):
    """Base: the two projections, and which heads are this rank's. Hidden states are Megatron's ``[time, batch, hidden]``,
    of the tokens that the sequence's layout gives this rank.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, heads: int, head_dim: int, parts: int):
        """``parts`` vectors of ``head_dim`` per head are projected from the hidden state."""
        super().__init__(config)
        self.head_dim = head_dim
        self.local_heads = heads // pg_collection.tp.size()
        self.first_head = pg_collection.tp.rank() * self.local_heads
        self.cp_group = pg_collection.cp
        shared = {"config": config, "bias": False, "skip_bias_add": True, "tp_group": pg_collection.tp}
        self.linear_in = ColumnParallelLinear(
            config.hidden_size, heads * parts * head_dim, init_method=config.init_method, gather_output=False, **shared
        )
        self.linear_proj = RowParallelLinear(
            config.num_attention_heads * config.kv_channels,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **shared,
        )

    def project(self, hidden: Tensor) -> Tensor:
        """``[batch, time, local heads, rows per head]``."""
        return self.linear_in(hidden)[0].transpose(0, 1).unflatten(-1, (self.local_heads, -1))

    def output(self, mixed: Tensor) -> Tensor:
        """From ``[batch, time, local heads * head_dim]`` to ``[time, batch, hidden]``."""
        return self.linear_proj(mixed.transpose(0, 1).contiguous())[0]


class SoftmaxAttention(Mixer):
    """Attention with grouped queries; per KV head the rows are its queries, their gates, its key and its value."""

    def __init__(
        self,
        config: TransformerConfig,
        block: SoftmaxBlock,
        rope_theta: float,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ):
        self.group = config.num_attention_heads // config.num_query_groups
        self.parts = [self.group, self.group if block.output_gate else 0, 1, 1]
        super().__init__(config, pg_collection, config.num_query_groups, config.kv_channels, sum(self.parts))
        self.block = block
        self.rotary_dim, self.rope_theta = int(self.head_dim * block.rotary_fraction), rope_theta
        self.pattern = block.attention_pattern(config.num_query_groups).from_head(self.first_head)
        if block.qk_norm and pg_collection.tp.size() > 1 and not config.qk_layernorm:
            raise ValueError("a block has qk_norm: set qk_layernorm in the TransformerConfig, or its gradients are not summed")
        if block.qk_norm:  # these names ask Megatron to sum their gradients over the ranks' heads
            self.q_layernorm = RMSNorm(config, self.head_dim, config.layernorm_epsilon)
            self.k_layernorm = RMSNorm(config, self.head_dim, config.layernorm_epsilon)
        self.sinks = None
        if block.attention_sink:
            weight = self.linear_in.weight
            self.sinks = nn.Parameter(weight.new_zeros(self.local_heads * self.group))
            set_tensor_model_parallel_attributes(self.sinks, True, 0, 1)

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        rows = self.project(hidden).unflatten(-1, (-1, self.head_dim))
        q, gate, k, v = rows.split(self.parts, dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
        if self.block.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if self.rotary_dim:
            tables = sequence.rotary(self.rotary_dim, self.rope_theta)
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        logits = {"sinks": self.sinks, "softcap": self.block.softcap}
        out = attend(q, k, v, self.pattern, sequence.layout, self.cp_group, documents=sequence.all_documents, **logits)
        if self.block.output_gate:
            out = out * torch.sigmoid(gate.flatten(2, 3))
        return self.output(out.flatten(2))


class LightningAttention(Mixer):
    """MiniMax-01's lightning attention (arXiv 2501.08313 sec. 2.2): per head the rows are query, key, value and gate.

    SiLU on all three, a fixed decay, RMSNorm over all heads together, a sigmoid gate; no positions and no scale.
    """

    def __init__(
        self, config: TransformerConfig, block: LightningBlock, layer_number: int, pg_collection: ProcessGroupCollection
    ):
        heads, width = block.num_heads or config.num_attention_heads, config.num_attention_heads * config.kv_channels
        super().__init__(config, pg_collection, heads, width // heads, 4 if block.output_gate else 3)
        self.norm = ShardedRMSNorm(config, width, config.layernorm_epsilon, pg_collection.tp)
        decay = minimax_decay(heads, layer_number - 1, config.num_layers)[self.first_head : self.first_head + self.local_heads]
        self.register_buffer("decay", decay.to(self.linear_in.weight.device), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves with the model, but the decay stays fp32 when the model is cast: in bf16 it would be another decay."""
        decay = self.decay
        super()._apply(fn, recurse)
        self.decay = decay.to(self.decay.device)
        return self

    def forward(self, hidden: Tensor, sequence: Sequence) -> Tensor:
        q, k, v, *gate = self.project(hidden).split(self.head_dim, dim=-1)
        q, k, v = (torch.nn.functional.silu(x) for x in (q, k, v))
        out = linear_attention(q, k, v, sequence.layout, self.cp_group, decay=self.decay, documents=sequence.all_documents)
        out = self.norm(out.flatten(2))
        for g in gate:
            out = out * torch.sigmoid(g.flatten(2))
        return self.output(out)


def minimax_decay(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Natural log of each head's decay in layer ``layer`` (from 0), fp32 ``[num_heads]``, as `minimax` in transformers.

    ALiBi's geometric slopes, weaker from layer to layer and all but gone in the last.
    """
    base = 1 / 2 ** (8 / num_heads)
    slopes = base ** torch.arange(1, num_heads + 1, dtype=torch.float64)
    return -(slopes * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)).float()
