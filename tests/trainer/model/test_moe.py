"""Mixtures of experts against their formula, and recipes that are refused."""

import contextlib
import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from longspan.launch.process import process_group
from longspan.trainer.errors import UserError
from longspan.trainer.predict.flops import parameter_count
from longspan.trainer.recipe.file import load_recipe

from ..stacks import EXPERTS, SHARED_EXPERT


@contextlib.contextmanager
def engine_of(recipe_file, *overrides):
    from longspan.trainer.engines.build import build_engine

    with process_group(2):
        engine = build_engine(load_recipe(str(recipe_file), list(overrides)))
        with contextlib.closing(engine):
            yield engine


def swiglu(x, expert):
    gate, up = (x @ expert.linear_fc1.weight.T).chunk(2, -1)
    return (F.silu(gate) * up) @ expert.linear_fc2.weight.T


def by_formula(x, mlp, moe):
    """Send every token through its experts, one by one."""
    logits = x @ mlp.router.weight.T
    out = []
    for token, scores in zip(x, logits, strict=True):
        chosen = scores.topk(moe.num_experts_per_tok).indices
        weights = scores[chosen].softmax(-1) if moe.norm_topk_prob else scores.softmax(-1)[chosen]
        total = sum(
            w * swiglu(token, mlp.experts.local_experts[e])
            for w, e in zip(weights, chosen, strict=True)
        )
        if moe.shared_expert_intermediate_size:
            total = total + swiglu(token, mlp.shared_experts) * torch.sigmoid(
                token @ mlp.shared_experts.gate_weight[0]
            )
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("stack", [EXPERTS, SHARED_EXPERT], ids=["experts", "shared expert"])
def test_experts_match_the_formula(tiny_recipe, stack):
    with engine_of(tiny_recipe, *stack, "model.initializer_range=0.3") as engine:
        mlp = engine.model.decoder.layers[1].mlp
        moe = engine.recipe.model.moe
        assert sum(p.numel() for p in engine.model.parameters()) == parameter_count(
            engine.recipe.model, 257
        )
        x = torch.randn(23, 1, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        upstream = torch.randn(23, 64, generator=torch.Generator().manual_seed(1))
        engine.model.eval()  # without the balance loss
        ours = mlp(x)[0][:, 0]
        weights = [x, *mlp.parameters()]
        expected = by_formula(x[:, 0], mlp, moe)
        assert (ours - expected).norm() < 1e-5 * expected.norm()
        pairs = zip(
            torch.autograd.grad(ours, weights, upstream),
            torch.autograd.grad(expected, weights, upstream),
            strict=True,
        )
        assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-5


def test_the_balance_loss_is_part_of_the_gradient(tiny_recipe):
    """It is Switch Transformer's: experts x sum of (share of tokens) x (mean probability)."""
    with engine_of(tiny_recipe, *EXPERTS) as engine:
        mlp = engine.model.decoder.layers[1].mlp
        x = torch.randn(23, 1, 64, generator=torch.Generator().manual_seed(0))
        mlp(x)[0].sum().backward()
        ours = (
            mlp.router.weight.main_grad
            if hasattr(mlp.router.weight, "main_grad")
            else mlp.router.weight.grad
        )
        ours = ours.clone()
        weight = mlp.router.weight.detach().clone().requires_grad_()
        scores = x[:, 0] @ weight.T
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
        # Megatron counts a token once for each of its experts, and sums the loss over tokens.
        balance = 4 * (chosen.mean(0) / 2 * scores.softmax(-1).mean(0)).sum()
        torch.testing.assert_close(mlp.router.balance_loss(), balance.detach())
        mlp.zero_grad()
        engine.model.eval()
        out = by_formula(x[:, 0], _with_router(mlp, weight), engine.recipe.model.moe)
        expected = torch.autograd.grad(out.sum() + 0.1 * 23 * balance, weight)[0]
        assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_no_factor_of_megatron_reaches_the_balance_loss(tiny_recipe, monkeypatch):
    """Versions differ in what they multiply it by where losses are summed over tokens."""
    from longspan.trainer.megatron_core import TopKRouter

    def used(*args, **others):
        raise AssertionError("Megatron's balance loss was used")

    for method in ("attach_and_log_load_balancing_loss", "_apply_aux_loss"):
        monkeypatch.setattr(TopKRouter, method, used)
    with engine_of(tiny_recipe, *EXPERTS) as engine:
        router = engine.model.decoder.layers[1].mlp.router
        probs, _ = router(torch.randn(7, 1, 64, generator=torch.Generator().manual_seed(0)))
        (probs.sum() * 0).backward()
        assert router.weight.main_grad.norm() > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "seq_aux_loss is not supported"),
        ({"moe_router_score_function": "sigmoid"}, "sigmoid is not supported"),
    ],
)
def test_what_a_plain_megatron_config_must_not_ask_of_the_router(tiny_recipe, keys, message):
    from longspan.trainer.megatron_core import ProcessGroupCollection
    from longspan.trainer.model.moe import BalancedRouter

    with engine_of(tiny_recipe, *EXPERTS) as engine:
        config = copy.copy(engine.model.config)
        vars(config).update(keys)
        with pytest.raises(ValueError, match=message):
            BalancedRouter(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())


def _with_router(mlp, weight):
    """Return the MLP's experts with another router weight."""
    return SimpleNamespace(
        experts=mlp.experts,
        shared_experts=mlp.shared_experts,
        router=SimpleNamespace(weight=weight),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.moe=null"],
            "model.layers.blocks.lightning.mlp: is moe, but model.moe, "
            "which says how many experts, is missing",
        ),
        (
            ["model.moe.num_experts=3", "launch.processes=2", "parallel.ep=2"],
            "parallel.ep: 2 does not divide model.moe.num_exp",
        ),
        (
            ["launch.processes=2", "parallel.ep=4"],
            "parallel.ep: 4 does not divide the 2 ranks of a pipeline stage",
        ),
        (
            ["model.moe.num_experts_per_tok=5"],
            "model.moe.num_experts_per_tok: 5 is more than the 4 experts",
        ),
        (
            ["launch.processes=2", "parallel.tp=2"],
            "parallel.sequence_parallel: is needed by model.moe with parallel.tp 2",
        ),
        (
            ["memory.mlp_tile=8"],
            "memory.mlp_tile: 8 would balance the experts of lightning tile by tile",
        ),
        (
            ["model.moe.shared_expert_gate=true"],
            "model.moe.shared_expert_gate: has no expert to gate",
        ),
        (
            ["launch.processes=2", "parallel.ep=2", "engine.name=deepspeed"],
            "parallel.ep: 2 needs engine megatron",
        ),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel: splits tokens over tensor-parallel ranks",
        ),
    ],
)
def test_invalid_recipes_are_refused_before_any_process_starts(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(str(tiny_recipe), [*EXPERTS, *overrides])
