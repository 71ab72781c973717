"""From a recipe to Megatron-core's model."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ..layers.recompute import LayerMemory
from ..predict.flops import padded_vocab_size
from ..recipe.schema import Recipe
from .layer import hybrid_stack_spec
from .loss import cross_entropy_sum, token_losses
from .moe import moe_config


class HybridModel(GPTModel):
    """``GPTModel`` whose loss never has more logits than those of ``loss_tile`` tokens, and none of
    the vocabulary's padding.

    Called with ``labels`` and their weights as ``loss_mask``, both ``[batch, local time]``, it
    returns the sum of the losses; without gradients and without weights what
    :func:`~.loss.token_losses` returns.
    """

    def __init__(self, *args, real_vocab_size: int, loss_tile: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.loss_tile = loss_tile

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None,
        loss_mask: Tensor | None = None,
        **others,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, loss_mask=loss_mask, **others)
        if loss_mask is None and torch.is_grad_enabled():
            raise ValueError(
                "HybridModel: labels to train on come with their weights, as loss_mask"
            )
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        hidden = hidden.flatten(0, 1)  # [time * batch, hidden]
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        flat_labels = labels.T.flatten()  # [time * batch]
        vocabulary = tp_group, self.real_vocab_size, self.loss_tile
        if loss_mask is not None:
            weights = loss_mask.T.flatten()
            return cross_entropy_sum(hidden, weight, flat_labels, weights, *vocabulary)
        losses, is_likeliest = token_losses(hidden, weight, flat_labels, *vocabulary)
        time_batch = labels.T.shape
        return losses.unflatten(0, time_batch).T, is_likeliest.unflatten(0, time_batch).T


def transformer_config(recipe: Recipe, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's config of a recipe's model."""
    model = recipe.model
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.intermediate_size,
        layernorm_epsilon=model.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        qk_layernorm=any(block.norms_each_head for block in model.stack),
        tensor_model_parallel_size=recipe.parallel.tp,
        pipeline_model_parallel_size=recipe.parallel.pp,
        context_parallel_size=recipe.parallel.cp,
        sequence_parallel=recipe.parallel.sequence_parallel,
        expert_model_parallel_size=recipe.parallel.ep,
        expert_tensor_parallel_size=expert_tensor_parallel(recipe),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        bias_activation_fusion=torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        cuda_graph_scope=[],
        **moe_config(model),
    )


def expert_tensor_parallel(recipe: Recipe) -> int:
    """Return the number of ranks that split an expert's matrices: with expert parallelism, each
    expert is whole.
    """
    return 1 if recipe.parallel.ep > 1 else recipe.parallel.tp


def build_model(recipe: Recipe, vocab_size: int, dtype: torch.dtype) -> HybridModel:
    """Build this rank's part of the model, without initial weights. Needs Megatron's groups."""
    config = transformer_config(recipe, dtype)
    names = recipe.model.stack_names
    spec = hybrid_stack_spec(
        config,
        recipe.model.stack,
        recipe.model.rope_theta,
        schedules=[recipe.parallel.schedule_of(name) for name in names],
        memory=[layer_memory(recipe, name) for name in names],
    )
    return HybridModel(
        config,
        spec,
        vocab_size=padded_vocab_size(vocab_size),
        real_vocab_size=vocab_size,
        loss_tile=recipe.memory.loss_tile,
        max_sequence_length=recipe.training.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=recipe.model.tie_word_embeddings,
        position_embedding_type="none",
    )


def layer_memory(recipe: Recipe, block_name: str) -> LayerMemory:
    """Return what the layers of one block keep for their backward pass."""
    memory = recipe.memory
    return LayerMemory(memory.recompute_of(block_name), memory.mlp_tile, memory.offload_inputs)


def _leave_as_is(weight: Tensor) -> Tensor:
    """Weights are set by :mod:`.weights`, by name; Megatron's own would depend on the ranks."""
    return weight
