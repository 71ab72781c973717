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
    """``GPTModel`` whose loss has no logits but those of ``loss_tile`` tokens, and none of the vocabulary's padding.

    Called with ``labels`` and their weights as ``loss_mask``, both ``[batch, local time]``, it gives the sum of the losses;
    without gradients and without weights what :func:`~.loss.token_losses` does.
    """

    def __init__(self, *args, real_vocab_size: int, loss_tile: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.real_vocab_size, self.loss_tile = real_vocab_size, loss_tile

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
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        asked = hidden.flatten(0, 1), weight, labels.T.flatten()
        vocabulary = group, self.real_vocab_size, self.loss_tile
        if loss_mask is None and torch.is_grad_enabled():
            raise ValueError(
                "HybridModel: labels to train on come with their weights, as loss_mask"
            )
        if loss_mask is not None:
            return cross_entropy_sum(*asked, loss_mask.T.flatten(), *vocabulary)
        return tuple(
            each.unflatten(0, labels.T.shape).T for each in token_losses(*asked, *vocabulary)
        )


def transformer_config(recipe: Recipe, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's view of a recipe's model."""
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
    """Over how many ranks the matrices of an expert are split: where experts are spread over ranks, each is whole."""
    return 1 if recipe.parallel.ep > 1 else recipe.parallel.tp


def build_model(recipe: Recipe, vocab_size: int, dtype: torch.dtype) -> HybridModel:
    """This rank's part of the model, its weights not yet set. Needs Megatron's process groups."""
    config = transformer_config(recipe, dtype)
    return HybridModel(
        config,
        hybrid_stack_spec(
            config,
            recipe.model.stack,
            recipe.model.rope_theta,
            schedules=[recipe.parallel.schedule_of(name) for name in recipe.model.stack_names],
            memory=[layer_memory(recipe, name) for name in recipe.model.stack_names],
        ),
        vocab_size=padded_vocab_size(vocab_size),
        real_vocab_size=vocab_size,
        loss_tile=recipe.memory.loss_tile,
        max_sequence_length=recipe.training.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=recipe.model.tie_word_embeddings,
        position_embedding_type="none",
    )


def layer_memory(recipe: Recipe, block: str) -> LayerMemory:
    """Of the layers of one block."""
    memory = recipe.memory
    return LayerMemory(memory.recompute_of(block), memory.mlp_tile, memory.offload_inputs)


def _leave_as_is(weight: Tensor) -> Tensor:
    """Weights are set by :mod:`.weights`, by name; Megatron's own would depend on the ranks."""
    return weight
