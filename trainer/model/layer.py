"""One layer of a hybrid stack, and the Megatron-core spec of the stack."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...parallel import Sequence
from ..layers.base import Block, MixerContext
from ..layers.mixer import MegatronSizes
from ..layers.norm import RMSNorm
from ..layers.recompute import LayerMemory, OnHost, in_tiles, recomputed
from ..megatron_core import (
    ColumnParallelLinear,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    ProcessGroupCollection,
    RowParallelLinear,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)
from .gated_mlp import GatedMLP, identity
from .moe import moe_spec


def hybrid_stack_spec(
    config: TransformerConfig,
    stack: list[Block],
    rope_theta: float = 10000.0,
    vp_stage: int | None = None,
    schedules: list[str] | None = None,
    memory: list[LayerMemory] | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of this pipeline stage's layers, for a model of Megatron-core that has a
    ``TransformerBlock``: :class:`.model.HybridModel`, or its own ``GPTModel``.

    Build a ``GPTModel`` with ``position_embedding_type="none"``: the layers themselves know
    positions. Pass a :class:`~longspan.parallel.Sequence` as ``packed_seq_params`` if a batch holds
    several documents, or if its tokens are spread over context-parallel ranks.

    Args:
        stack: the block of every layer of the whole model, bottom up.
        schedules: the KV schedule of every layer, as :func:`longspan.parallel.attend` accepts it;
            None for ``auto``.
        memory: what every layer keeps for its backward pass; None for everything.

    Raises:
        ValueError: the stack does not have ``config.num_layers`` blocks.
    """
    if len(stack) != config.num_layers:
        raise ValueError(
            f"stack has {len(stack)} blocks, but config.num_layers is {config.num_layers}"
        )
    schedules = schedules or ["auto"] * len(stack)
    memory = memory or [LayerMemory()] * len(stack)
    first = get_transformer_layer_offset(config, vp_stage)
    last = first + get_num_layers_to_build(config, vp_stage)
    layers = [
        _layer_spec(config, stack[layer], rope_theta, schedules[layer], memory[layer])
        for layer in range(first, last)
    ]
    return TransformerBlockSubmodules(layers, layer_norm=RMSNorm)


def _layer_spec(
    config: TransformerConfig,
    block: Block,
    rope_theta: float,
    kv_schedule: str,
    memory: LayerMemory,
) -> ModuleSpec:
    if block.mlp == "moe":
        mlp = moe_spec()
    else:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = ModuleSpec(GatedMLP, submodules=linears)
    params = {
        "block": block,
        "rope_theta": rope_theta,
        "kv_schedule": kv_schedule,
        "memory": memory,
    }
    return ModuleSpec(HybridLayer, params=params, submodules=HybridLayerSubmodules(mlp))


@dataclass
class HybridLayerSubmodules:
    """The spec of the MLP; the block itself builds the mixer."""

    mlp: ModuleSpec


class HybridLayer(MegatronModule):
    """A mixer and an MLP, each with its norms and its way of joining the residual stream."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridLayerSubmodules,
        block: Block,
        rope_theta: float,
        kv_schedule: str,
        memory: LayerMemory,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ):
        super().__init__(config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.block = block
        self.memory = memory
        self.tp_group = pg_collection.tp
        pipeline_offset = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.layer_number = layer_number + pipeline_offset
        self.mixer = block.build_mixer(
            MixerContext(
                config=config,
                process_groups=pg_collection,
                sizes=MegatronSizes.of(config),
                layer=self.layer_number - 1,  # Megatron counts from 1
                rope_theta=rope_theta,
                kv_schedule=kv_schedule,
                recomputes=memory.recompute == "selective",
            )
        )
        self.mlp = self._build_mlp(submodules.mlp, pg_collection)
        for name in sorted(block.norm_names):
            norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.add_module(name, norm)

    def _build_mlp(self, spec: ModuleSpec, pg_collection: ProcessGroupCollection) -> MegatronModule:
        config = self.config
        if self.block.mlp_activation == "identity":
            config = copy.copy(config)
            config.activation_func = identity
        if self.block.mlp == "moe":
            return spec(config=config, layer_number=self.layer_number, pg_collection=pg_collection)
        return spec(
            config=config, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        packed_seq_params: Sequence | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        """Compute the layer on ``[time, batch, hidden]``.

        Returns:
            The same shape, and the ``context`` that Megatron's blocks pass from layer to layer.
        """
        for name, value in {"attention_mask": attention_mask, "context": context, **others}.items():
            if value is not None:
                raise ValueError(
                    f"HybridLayer cannot use {name}: masks come from the pattern and the documents"
                )
        sequence = packed_seq_params or self._one_document(hidden_states)
        if self.memory.recompute != "full":
            return self._compute(hidden_states, sequence), None
        with OnHost() if self.memory.offload else contextlib.nullcontext():
            return recomputed(self._compute, hidden_states, sequence), None

    def _compute(self, x: Tensor, sequence: Sequence) -> Tensor:
        x = self._join(
            x,
            lambda normed: self.mixer(normed, sequence),
            "input_layernorm",
            "post_mixer_layernorm",
            self.block.mixer_residual,
        )
        if self.memory.recompute == "selective":
            return recomputed(self._feed_forward, x)
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        def mlp(normed: Tensor) -> Tensor:
            return in_tiles(lambda tile: self.mlp(tile)[0], normed, self.memory.mlp_tile)

        return self._join(
            x, mlp, "pre_mlp_layernorm", "post_mlp_layernorm", self.block.mlp_residual
        )

    def _join(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        norm_before: str,
        norm_after: str,
        scales: tuple[float, float],
    ) -> Tensor:
        """Add a branch's output to the residual stream, with the norms and scales of the block."""
        normed = self._modules[norm_before](x) if norm_before in self._modules else x
        out = branch(normed)
        if norm_after in self._modules:
            out = self._modules[norm_after](out)
        residual = normed if self.block.norm == "post" else x
        residual_scale, branch_scale = scales
        return _scaled(residual, residual_scale) + _scaled(out, branch_scale)

    def _one_document(self, hidden_states: Tensor) -> Sequence:
        length, batch = hidden_states.shape[:2]
        if self.config.sequence_parallel:
            length *= self.tp_group.size()
        return Sequence.single(batch, length, hidden_states.device)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale
