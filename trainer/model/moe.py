"""Mixtures of experts: Megatron-core's layer, as this project's layers take it."""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from ..recipe.schema import ModelConfig


def moe_spec(num_experts: int) -> ModuleSpec:
    """Routed experts and, where the config has its size, a shared one."""
    spec = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
    spec.submodules.router = BalancedRouter
    spec.submodules.experts.module = GroupedExperts
    return spec


def moe_config(model: ModelConfig) -> dict:
    """What Megatron's config says of the experts; nothing where the model has none."""
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
        # Gloo takes no tensors as sizes, which Megatron's all-to-all hands it.
        "moe_token_dispatcher_type": "alltoall" if torch.cuda.is_available() else "allgather",
    }


if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = (
        None  # which Megatron-core 0.16.1 reads, and without Transformer Engine does not define
    )


class GroupedExperts(SequentialMLP):
    """Megatron's experts, each with parameters of its own, that multiply their tokens at once (torch's ``grouped_mm``)."""

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """``[tokens, hidden]``, sorted by expert, in and out; ``probs [tokens]`` multiply what the experts give."""
        if tokens.dtype == torch.float64:  # which grouped_mm does not know
            return super().forward(tokens, tokens_per_expert, probs)
        ends = tokens_per_expert.to(tokens.device).cumsum(0).int()

        def product(x: Tensor, name: str) -> Tensor:
            weights = torch.stack([getattr(expert, name).weight for expert in self.local_experts])
            return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)

        gate, up = product(tokens, "linear_fc1").chunk(2, -1)
        inner = self.config.activation_func(gate) * up * probs[:, None]
        return product(inner.to(tokens.dtype), "linear_fc2"), None


class BalancedRouter(TopKRouter):
    """Megatron's, whose balance loss weighs the same on any number of context-parallel ranks.

    Each of them has its part of the loss. Where losses are summed over tokens, as here, Megatron-core 0.16.1 weighs the part by
    the rank's tokens instead of by those of all ranks.
    """

    def __init__(self, *args, **others):
        super().__init__(*args, **others)
        self._sum, self._seen = 0.0, 0

    def balance_loss(self) -> Tensor | float:
        """This rank's part of Switch Transformer's loss, without its weight: mean over the microbatches since the last call."""
        mean = self._sum / max(1, self._seen)
        self._sum, self._seen = 0.0, 0
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
        self._sum += aux_loss.detach() / aux_loss_coeff
        self._seen += 1  # once more where it is recomputed, which leaves the mean as it is
        tokens = valid_token_count * reduce_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            *args,
            valid_token_count=tokens,
            **others,
        )
