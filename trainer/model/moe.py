"""Mixtures of experts: Megatron-core's layer, with a router and experts of our own."""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from ..recipe.schema import ModelConfig

if not hasattr(moe_utils, "te_general_gemm"):
    # Megatron-core 0.16.1 reads it, and defines it only with Transformer Engine.
    moe_utils.te_general_gemm = None


def moe_spec(num_experts: int) -> ModuleSpec:
    """Return the spec of routed experts and, if the config has its size, a shared one."""
    spec = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
    spec.submodules.router = BalancedRouter
    spec.submodules.experts.module = GroupedExperts
    return spec


def moe_config(model: ModelConfig) -> dict:
    """Return the keys of Megatron's config that describe experts; none if the model has none."""
    moe = model.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.num_experts_per_tok,
        "moe_ffn_hidden_size": moe.intermediate_size or model.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "moe_router_pre_softmax": not moe.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss" if moe.router_aux_loss_coef else "none",
        "moe_aux_loss_coeff": moe.router_aux_loss_coef,
        "moe_router_dtype": "fp32",
        # Megatron's all-to-all passes sizes as tensors, which gloo does not accept.
        "moe_token_dispatcher_type": "alltoall" if torch.cuda.is_available() else "allgather",
    }


class GroupedExperts(SequentialMLP):
    """Megatron's experts, each with parameters of its own, that multiply their tokens at once
    (torch's ``grouped_mm``).
    """

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """Apply every expert to its tokens.

        Args:
            tokens: ``[tokens, hidden]``, sorted by expert; the output has the same shape.
            tokens_per_expert: ``[local experts]``.
            probs: ``[tokens]``, by which the experts' outputs are multiplied.
        """
        if tokens.dtype == torch.float64:  # grouped_mm has no fp64
            return super().forward(tokens, tokens_per_expert, probs)
        expert_ends = tokens_per_expert.to(tokens.device).cumsum(0).int()

        def multiply(x: Tensor, name: str) -> Tensor:
            weights = torch.stack([getattr(expert, name).weight for expert in self.local_experts])
            return F.grouped_mm(x, weights.transpose(1, 2), offs=expert_ends)

        gate, up = multiply(tokens, "linear_fc1").chunk(2, -1)
        inner = self.config.activation_func(gate) * up * probs[:, None]
        return multiply(inner.to(tokens.dtype), "linear_fc2"), None


class BalancedRouter(TopKRouter):
    """Megatron's router, with the same balance loss on any number of context-parallel ranks.

    Each of these ranks computes its part of the loss. Where losses are summed over tokens, as here,
    Megatron-core 0.16.1 weighs the part by the rank's tokens instead of by those of all ranks.
    """

    def __init__(self, *args, **others):
        super().__init__(*args, **others)
        self._loss_sum: Tensor | float = 0.0
        self._num_losses = 0

    def balance_loss(self) -> Tensor | float:
        """Return this rank's part of Switch Transformer's loss, without its weight: the mean over
        the microbatches since the last call.
        """
        mean = self._loss_sum / max(1, self._num_losses)
        self._loss_sum = 0.0
        self._num_losses = 0
        return mean

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff,
        aux_loss,
        aux_loss_name,
        reduce_group,
        *args,
        valid_token_count,
        **others,
    ) -> Tensor:
        self._loss_sum += aux_loss.detach() / aux_loss_coeff
        self._num_losses += 1  # twice where it is recomputed, which leaves the mean as it is
        tokens_of_all_ranks = valid_token_count * reduce_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            *args,
            valid_token_count=tokens_of_all_ranks,
            **others,
        )
