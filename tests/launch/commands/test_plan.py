"""``longspan plan``: its predictions are consistent, at sizes that no test could run."""

import pytest
from longspan.trainer.predict.estimate import DEVICES, estimate
from longspan.trainer.predict.flops import parameter_count
from longspan.trainer.recipe.file import load_recipe

LARGE = [
    "model.hidden_size=4096",
    "model.num_attention_heads=32",
    "model.num_key_value_heads=8",
    "model.num_hidden_layers=32",
    "model.intermediate_size=14336",
    "model.layers.blocks.sparse={mixer: s2, block: 64, local_blocks: 128, stride: 16}",
    "model.layers.blocks.linear={mixer: lightning, num_heads: 32}",
    "training.seq_length=1048576",
    "training.micro_batch_size=1",
    "evaluation.ngram_baseline=false",
]


def large(ranks, *overrides):
    sizes = [f"parallel.cp={ranks}", f"launch.processes={ranks}", "training.global_batch_size=1"]
    return load_recipe("quickstart", [*LARGE, *sizes, *overrides])


def test_memory_and_compute_time_shrink_with_the_ranks():
    device = DEVICES["h100"]
    estimates = {ranks: estimate(large(ranks), 257, device) for ranks in (8, 64)}
    total = parameter_count(large(8).model, 257)
    for ranks, predicted in estimates.items():
        assert predicted.parameters == total
        assert predicted.memory.weights == 2 * total
        assert predicted.memory.optimizer == 12 * total / ranks
        assert predicted.tokens_per_second == pytest.approx((1 << 20) / predicted.step_s)
        # All matrices except the embeddings need two operations per parameter and token; attention
        # and states need more.
        matrices = 2 * (total - 384 * 4096)
        forward = predicted.head_flops + sum(
            kind.layers * (kind.mixer_flops + kind.mlp_flops) for kind in predicted.kinds
        )
        assert forward > matrices
    few_ranks = estimates[8]
    many_ranks = estimates[64]
    # Not exactly 8 times: the balance of the work differs.
    assert few_ranks.compute_s == pytest.approx(8 * many_ranks.compute_s, rel=1e-3)
    assert few_ranks.memory.activations == pytest.approx(8 * many_ranks.memory.activations)


def test_sparse_layers_receive_less_than_full_ones():
    predicted = estimate(large(64, "parallel.schedules.sparse=stripes"), 257, DEVICES["h100"])
    kinds = {kind.name: kind for kind in predicted.kinds}
    assert kinds["linear"].received < kinds["sparse"].received < kinds["full"].received
    # Keys and values are received in forward and again in backward, where gradients return as well:
    # three times the traffic of the plan's forward.
    assert kinds["sparse"].received / 2**20 == pytest.approx(3 * 316, rel=0.02)


def test_the_rank_with_most_work_sets_the_time():
    even, uneven = (
        estimate(
            large(8, f"parallel.layout={layout}", "parallel.schedule=ring"), 257, DEVICES["h100"]
        )
        for layout in ("zigzag", "contiguous")
    )
    kinds = {kind.name: kind for kind in uneven.kinds}
    assert kinds["full"].work == pytest.approx(15 / 8, rel=1e-3)
    assert 1.5 < kinds["sparse"].work < kinds["full"].work
    assert kinds["linear"].work == 1.0
    assert max(kind.work for kind in even.kinds) < 1.02
    assert uneven.compute_s > 1.5 * even.compute_s


def test_the_command_prints_a_plan_and_draws_a_picture(longspan, tmp_path):
    picture = tmp_path / "new" / "plan.png"
    recipe = ["quickstart", "parallel.cp=16", "training.seq_length=65536"]
    completed = longspan("plan", *recipe, "--gpus", "64", "--device", "h200", "-o", picture)
    assert completed.returncode == 0, completed.stderr
    assert "predicted for 64 x h200; nothing here was measured" in completed.stdout
    assert "dp 4 x cp 16 x pp 1 x tp 1" in completed.stdout
    assert "sparse: schedule " in completed.stdout
    assert "backends: linear triton; full triton" in completed.stdout
    assert "warning: sparse is computed by torch's formulas" in completed.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_linear_layers_alone_have_no_schedules_to_draw(longspan, tmp_path):
    linear = [
        "model.layers.pattern=[linear]",
        "model.layers.blocks.full=null",
        "model.layers.blocks.sparse=null",
    ]
    completed = longspan("plan", "quickstart", *linear, "-o", tmp_path / "plan.png")
    assert completed.returncode == 0, completed.stderr
    assert "only states move" in completed.stdout
    assert not (tmp_path / "plan.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device", "h10"],
            "--device: unknown (did you mean h100?); known: a100, h100, h200, b200",
        ),
        (["--gpus", "0"], "--gpus: must be at least 1, got 0"),
        (
            ["--gpus", "7"],
            "launch.processes: 7 is not a multiple of parallel.tp * cp * pp = 2; use 2",
        ),
    ],
)
def test_invalid_options_give_one_line_and_status_2(longspan, tmp_path, arguments, message):
    completed = longspan("plan", "quickstart", *arguments, "-o", tmp_path / "plan.png")
    assert completed.returncode == 2, completed.stdout + completed.stderr
    assert message in completed.stderr
    assert len(completed.stderr.splitlines()) == 1


def test_memory_follows_the_engine_and_its_options():
    device = DEVICES["h100"]
    options = ["engine.name=deepspeed"]
    total = parameter_count(large(8).model, 257)
    for stage, weight_shards, gradient_shards in ((0, 1, 1), (1, 1, 1), (2, 1, 8), (3, 8, 8)):
        recipe = large(8, *options, f"engine.zero_stage={stage}", "training.dtype=float32")
        memory = estimate(recipe, 257, device).memory
        assert memory.weights == 2 * total / weight_shards
        assert memory.gradients == 4 * total / gradient_shards
        assert memory.optimizer == 12 * total / (8 if stage else 1)
    without_recompute, selective, full = (
        estimate(large(8, f"memory.recompute={mode}"), 257, device)
        for mode in ("none", "selective", "full")
    )
    assert (
        without_recompute.memory.activations
        > selective.memory.activations
        > full.memory.activations
    )
    assert (
        without_recompute.compute_s
        < selective.compute_s
        < full.compute_s
        < 1.34 * without_recompute.compute_s
    )


def test_expert_parallel_spreads_the_weights():
    experts = [
        "model.moe={num_experts: 8}",
        *(f"model.layers.blocks.{name}.mlp=moe" for name in ("full", "sparse", "linear")),
    ]
    whole, spread = (
        estimate(large(8, *experts, f"parallel.ep={ep}"), 257, DEVICES["h100"]) for ep in (1, 8)
    )
    assert whole.parameters == spread.parameters
    assert spread.memory.weights < 0.3 * whole.memory.weights
    # The optimizer's state is sharded over all ranks in both cases.
    assert spread.memory.optimizer == pytest.approx(whole.memory.optimizer)
    assert spread.compute_s == pytest.approx(whole.compute_s)
