"""Mixtures of experts: Megatron-core's layer, with a router and experts of our own."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..megatron_core import (
    ColumnParallelLinear,
    MLPSubmodules,
    ModuleSpec,
    MoEAuxLossAutoScaler,
    MoELayer,
    MoESubmodules,
    RowParallelLinear,
    SequentialMLP,
    TopKRouter,
)
from ..recipe.schema import ModelConfig
from .gated_mlp import SharedExpert, gated_activation


def moe_spec() -> ModuleSpec:
    """Return the spec of routed experts and, if the config has its size, a shared one."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    submodules = MoESubmodules(
        router=BalancedRouter,
        experts=ModuleSpec(GroupedExperts, submodules=linears),
        shared_experts=ModuleSpec(SharedExpert, submodules=linears),
    )
    return ModuleSpec(MoELayer, submodules=submodules)


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
    """Megatron's experts, each with parameters of its own, which multiply their tokens in place.

    torch's ``grouped_mm`` would need a copy of all experts' weights beside one another, forward and
    backward: as much traffic as the products themselves have time for.
    """

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """Apply every expert to its tokens.

        Args:
            tokens: ``[tokens, hidden]``, sorted by expert; the output has the same shape.
            tokens_per_expert: ``[local experts]``, on the host, where Megatron-core has them.
            probs: ``[tokens]``, by which the experts' outputs are multiplied.
        """
        counts = tokens_per_expert.tolist()
        first = [expert.linear_fc1.weight for expert in self.local_experts]
        second = [expert.linear_fc2.weight for expert in self.local_experts]
        inner = _GroupedProduct.apply(tokens, counts, *first)
        active = gated_activation(inner, self.config.activation_func, probs)
        return _GroupedProduct.apply(active, counts, *second), None


class _GroupedProduct(torch.autograd.Function):
    """``tokens @ weight.T`` with the weight of each group of tokens; keeps no copy of a weight."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, *weights)
        ctx.counts = counts
        out = tokens.new_empty(len(tokens), len(weights[0]))
        groups = zip(tokens.split(counts), weights, out.split(counts), strict=True)
        for group, weight, out_group in groups:
            torch.mm(group, weight.T, out=out_group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *weights = ctx.saved_tensors
        grad_tokens = torch.empty_like(tokens)
        grad_weights = []
        for group, weight, grad_group, grad in zip(
            tokens.split(ctx.counts),
            weights,
            grad_tokens.split(ctx.counts),
            grad_out.split(ctx.counts),
            strict=True,
        ):
            torch.mm(grad, weight, out=grad_group)
            grad_weights.append(grad.T @ group)
        return grad_tokens, None, *grad_weights


class BalancedRouter(TopKRouter):
    """Megatron's router, with a balance loss of its own: Switch Transformer's (arXiv 2101.03961).

    Megatron weighs its balance loss by factors that changed from version to version and are wrong
    in some of them when context- or tensor-parallel ranks share the tokens. Here the loss and its
    gradient are the same on any number of ranks, with any version.

    Raises:
        ValueError: the config asks for a balance that this router does not have.
    """

    def __init__(self, *args, **others):
        super().__init__(*args, **others)
        config = self.config
        if config.moe_router_load_balancing_type not in ("aux_loss", "none"):
            raise ValueError(
                f"moe_router_load_balancing_type: {config.moe_router_load_balancing_type} is not "
                "supported; experts are balanced by aux_loss or none"
            )
        if config.moe_router_score_function != "softmax":
            raise ValueError(
                f"moe_router_score_function: {config.moe_router_score_function} is not supported; "
                "use softmax"
            )
        balances = config.moe_router_load_balancing_type == "aux_loss"
        self._coefficient = config.moe_aux_loss_coeff if balances else 0.0
        self.routing_type = "none"  # so that Megatron adds no balance loss
        self._loss_sum: Tensor | float = 0.0
        self._num_losses = 0

    def balance_loss(self) -> Tensor | float:
        """Return this rank's part of the balance loss, without its weight: the mean over the
        microbatches since the last call.
        """
        mean = self._loss_sum / max(1, self._num_losses)
        self._loss_sum = 0.0
        self._num_losses = 0
        return mean

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return which experts each token goes to, and with which weights.

        Args:
            logits: ``[time, batch, experts]``.
            padding_mask: which tokens are padding; not supported.

        Returns:
            Weights and choices ``[tokens, experts]``. The balance loss hangs on the weights: it is
            differentiated whenever they are.
        """
        if padding_mask is not None:
            raise ValueError("BalancedRouter cannot use padding_mask: all tokens are balanced")
        probs, routing_map = super().routing(logits)
        if self._coefficient and self.training and torch.is_grad_enabled():
            probs = self._with_balance_loss(probs, logits.flatten(0, 1))
        return probs, routing_map

    def _with_balance_loss(self, probs: Tensor, logits: Tensor) -> Tensor:
        """Return ``probs``, through which the balance loss of ``logits [tokens, experts]`` gets its
        gradient.

        The loss is ``experts * sum over experts of (share of choices) * (mean probability)``. The
        shares are those of all ranks that have tokens of these sequences, the probabilities those
        of this rank's tokens, so that the ranks' parts add up to the whole.
        """
        scores = logits.softmax(-1, dtype=torch.float32)
        chosen = scores.topk(self.topk, dim=1).indices
        num_choices = torch.zeros_like(scores, dtype=torch.int64).scatter(1, chosen, 1).sum(0)
        group = self.tp_cp_group
        if group.size() > 1:
            dist.all_reduce(num_choices, group=group)

        num_tokens = len(scores) * group.size()
        factor = self.num_experts * self._coefficient / (self.topk * num_tokens * num_tokens)
        loss = (scores.sum(0) * num_choices).sum() * factor
        self._loss_sum += loss.detach() / self._coefficient
        self._num_losses += 1  # twice where it is recomputed, which leaves the mean as it is
        if self.config.calculate_per_token_loss:
            loss = loss * num_tokens  # gradients are divided by the tokens of all ranks
        return MoEAuxLossAutoScaler.apply(probs, loss)
