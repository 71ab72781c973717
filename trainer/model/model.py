"""From a recipe to Megatron-core's model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel import Sequence
from ..layers.recompute import LayerMemory
from ..megatron_core import (
    ColumnParallelLinear,
    LanguageModelEmbedding,
    LanguageModule,
    ModelType,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    parallel_state,
)
from ..predict.flops import padded_vocab_size
from ..recipe.schema import Recipe
from .layer import hybrid_stack_spec
from .loss import cross_entropy_sum, token_losses
from .moe import moe_config


class HybridModel(LanguageModule):
    """A language model of Megatron-core: an embedding, a stack of our layers, an output matrix.

    Its parameters have the names that they have in Megatron's ``GPTModel``, which is deprecated
    there. The loss never has more logits than those of ``loss_tile`` tokens, and none of the
    vocabulary's padding.

    Args:
        config: of the model.
        spec: of the layers of this pipeline stage.
        vocab_size: rows of the embedding, with padding.
        real_vocab_size: number of token ids.
        loss_tile: number of tokens whose logits exist at a time.
        max_sequence_length: tokens of a sequence.
        pre_process: whether this stage has the embedding.
        post_process: whether this stage has the output matrix.
        share_embeddings_and_output_weights: whether embedding and output matrix are one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        *,
        vocab_size: int,
        real_vocab_size: int,
        loss_tile: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        share_embeddings_and_output_weights: bool = False,
    ):
        super().__init__(config)
        self.real_vocab_size, self.loss_tile = real_vocab_size, loss_tile
        # Megatron's schedules and its reduction of gradients ask for these.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights

        tp_group = self.pg_collection.tp
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size,
                max_sequence_length,
                position_embedding_type="none",  # the layers know positions
                tp_group=tp_group,
            )
        self.decoder = TransformerBlock(
            config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
                tp_group=tp_group,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the hidden states from the pipeline stage before, as Megatron's schedules do."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens: Tensor,
        position_ids: None = None,
        attention_mask: None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: Sequence | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute this pipeline stage; called as Megatron's ``GPTModel`` is.

        Args:
            tokens: ids ``[batch, local time]``.
            position_ids: None: positions count from the start of a document.
            attention_mask: None: masks come from the patterns and the documents.
            labels: ids ``[batch, local time]``.
            loss_mask: weights of the labels, in the same shape.
            packed_seq_params: the documents of the batch, and which of their tokens this rank has;
                None for one document a row, whole on this rank.

        Returns:
            What the next stage takes, ``[time, batch, hidden]``. From the last stage: logits of
            this rank's part of the vocabulary, ``[batch, time, vocab]``; with labels and their
            weights the sum of the losses; with labels alone, and no gradients, what
            :func:`~.loss.token_losses` returns.
        """
        if position_ids is not None:
            raise ValueError("HybridModel cannot use position_ids: positions come from documents")
        hidden = self.decoder(
            hidden_states=self.embedding(tokens, None) if self.pre_process else None,
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
        )
        if not self.post_process:
            return hidden
        if labels is not None:
            return self._losses(hidden, labels, loss_mask)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        logits, _ = self.output_layer(hidden, weight=weight)  # [time, batch, local vocab]
        return logits.transpose(0, 1).contiguous()

    def _losses(
        self, hidden: Tensor, labels: Tensor, loss_mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss sum or the loss of each label; see :meth:`forward`."""
        if loss_mask is None and torch.is_grad_enabled():
            raise ValueError(
                "HybridModel: labels to train on come with their weights, as loss_mask"
            )
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
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
        fp16=dtype == torch.float16,
        use_cpu_initialization=not torch.cuda.is_available(),
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        bias_activation_fusion=False,  # GatedMLP has a kernel of its own
        gradient_accumulation_fusion=False,
        batch_p2p_sync=False,  # else the host waits for the GPU at every message between stages
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
    )


def layer_memory(recipe: Recipe, block_name: str) -> LayerMemory:
    """Return what the layers of one block keep for their backward pass."""
    memory = recipe.memory
    return LayerMemory(memory.recompute_of(block_name), memory.mlp_tile, memory.offload_inputs)


def _leave_as_is(weight: Tensor) -> Tensor:
    """Weights are set by :mod:`.weights`, by name; Megatron's own would depend on the ranks."""
    return weight
