"""One layer of a hybrid stack, and the Megatron-core spec of the stack."""

import contextlib
import copy
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from ...parallel import Sequence
from ..layers.base import Block
from ..layers.mixer import MixerOptions
from ..layers.norm import RMSNorm
from ..layers.recompute import LayerMemory, OnHost, in_tiles, recomputed
from .moe import moe_spec


def hybrid_stack_spec(
    config: TransformerConfig,
    stack: list[Block],
    rope_theta: float = 10000.0,
    vp_stage: int | None = None,
    schedules: list[str] | None = None,
    memory: list[LayerMemory] | None = None,
) -> TransformerBlockSubmodules:
    """Spec of the layers of this pipeline stage, for Megatron-core's ``GPTModel``.

    Build the model with ``position_embedding_type="none"``: positions are the layers' business. Pass a
    :class:`~longspan.parallel.Sequence` as ``packed_seq_params`` where a batch holds several documents, or where its
    tokens are spread over context-parallel ranks.

    Args:
        stack: the block of every layer of the whole model, bottom up.
        schedules: of each layer, as :func:`longspan.parallel.attend` takes it; None for ``auto``.
        memory: what each layer keeps for its backward pass; None for all.
    """
    if len(stack) != config.num_layers:
        raise ValueError(
            f"stack has {len(stack)} blocks, but config.num_layers is {config.num_layers}"
        )
    offset = get_transformer_layer_offset(config, vp_stage)
    mine = slice(offset, offset + get_num_layers_to_build(config, vp_stage))
    schedules, memory = schedules or ["auto"] * len(stack), memory or [LayerMemory()] * len(stack)
    layers = zip(stack[mine], schedules[mine], memory[mine], strict=True)
    return TransformerBlockSubmodules(
        [
            _layer_spec(config, block, rope_theta, schedule, kept)
            for block, schedule, kept in layers
        ],
        layer_norm=RMSNorm,
    )


def _layer_spec(
    config: TransformerConfig, block: Block, rope_theta: float, schedule: str, memory: LayerMemory
) -> ModuleSpec:
    options = MixerOptions(rope_theta, schedule, recomputes=memory.recompute == "selective")
    mixer = ModuleSpec(block.mixer_class(), params={"block": block, "options": options})
    if block.mlp == "moe":
        mlp = moe_spec(config.num_moe_experts)
    else:
        mlp = ModuleSpec(
            MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )
    return ModuleSpec(
        HybridLayer,
        params={"block": block, "memory": memory},
        submodules=HybridLayerSubmodules(mixer, mlp),
    )


@dataclass
class HybridLayerSubmodules:
    """Specs of a layer's two halves."""

    mixer: ModuleSpec
    mlp: ModuleSpec


class HybridLayer(MegatronModule):
    """A mixer and an MLP, each with its norms and its way of joining the residual stream."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridLayerSubmodules,
        block: Block,
        memory: LayerMemory,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ):
        super().__init__(config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.block, self.memory, self.tp_group = block, memory, pg_collection.tp
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, pg_collection.pp.rank()
        )
        self.mixer = submodules.mixer(
            config=config, layer_number=self.layer_number, pg_collection=pg_collection
        )
        if block.mlp_activation == "identity":
            config = copy.copy(config)
            config.activation_func, config.bias_activation_fusion = _identity, False
        if block.mlp == "moe":
            self.mlp = submodules.mlp(
                config=config, layer_number=self.layer_number, pg_collection=pg_collection
            )
        else:
            self.mlp = submodules.mlp(
                config=config, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp
            )
        for name in sorted(block.norm_names):
            self.add_module(name, RMSNorm(config, config.hidden_size, config.layernorm_epsilon))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        packed_seq_params: Sequence | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        """``[time, batch, hidden]`` in and out, with the ``context`` that Megatron's blocks hand on."""
        for name, value in {"attention_mask": attention_mask, "context": context, **others}.items():
            if value is not None:
                raise ValueError(
                    f"HybridLayer cannot use {name}: masks come from the pattern and the documents"
                )
        sequence = packed_seq_params or self._one_document(hidden_states)
        if self.memory.recompute != "full":
            return self._layer(hidden_states, sequence), None
        with OnHost() if self.memory.offload else contextlib.nullcontext():
            return recomputed(self._layer, hidden_states, sequence), None

    def _layer(self, x: Tensor, sequence: Sequence) -> Tensor:
        def mix(x: Tensor) -> Tensor:
            return self.mixer(x, sequence)

        x = self._join(x, mix, "input_layernorm", "post_mixer_layernorm", self.block.mixer_residual)
        return (
            recomputed(self._feed_forward, x)
            if self.memory.recompute == "selective"
            else self._feed_forward(x)
        )

    def _feed_forward(self, x: Tensor) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            return in_tiles(lambda part: self.mlp(part)[0], x, self.memory.mlp_tile)

        return self._join(
            x, mlp, "pre_mlp_layernorm", "post_mlp_layernorm", self.block.mlp_residual
        )

    def _join(
        self, x: Tensor, branch, norm_before: str, norm_after: str, scales: tuple[float, float]
    ) -> Tensor:
        normed = self._modules[norm_before](x) if norm_before in self._modules else x
        out = branch(normed)
        if norm_after in self._modules:
            out = self._modules[norm_after](out)
        skip = normed if self.block.norm == "post" else x
        return _scaled(skip, scales[0]) + _scaled(out, scales[1])

    def _one_document(self, hidden_states: Tensor) -> Sequence:
        length, batch = hidden_states.shape[:2]
        if self.config.sequence_parallel:
            length *= self.tp_group.size()
        return Sequence.single(batch, length, hidden_states.device)


def _identity(x: Tensor) -> Tensor:
    return x


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale
