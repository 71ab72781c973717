"""The same model, data and losses in every arrangement of ranks: processes against one rank."""

from pathlib import Path

import pytest
import torch

from ..stacks import EXPERTS, LINEAR, LINEAR_MORE, MIXED, MOBA, PATTERNS, SHARED_EXPERT

WORKER = Path(__file__).parent / "parity_worker.py"
# Arrangements by name: (processes, overrides).
PAIRS = {
    "dp": (2, []),
    "tp": (2, ["parallel.tp=2"]),
    "pp": (2, ["parallel.pp=2"]),
    "cp": (2, ["parallel.cp=2"]),
}
CONTEXT = {"cp-tp": (4, ["parallel.cp=2", "parallel.tp=2"])}
GRID = {
    "cp-schedules": (
        4,
        ["parallel.cp=4", "parallel.schedule=grid", "parallel.schedules.sparse=stripes"],
    )
}
MORE_CONTEXT = {
    "cp-contiguous": (2, ["parallel.cp=2", "parallel.layout=contiguous"]),
    "cp-dp": (4, ["parallel.cp=2"]),
    "cp-pp": (4, ["parallel.cp=2", "parallel.pp=2"]),
}
SCHEDULES = {
    **{
        f"cp-{name}": (2, ["parallel.cp=2", f"parallel.schedule={name}"])
        for name in ("ring", "gather", "stripes", "heads")
    },
    "cp-4": (4, ["parallel.cp=4"]),
}


def zero(stage, *overrides):
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}", *overrides]


ON_CPU = "{device: cpu}"
ZERO = {"zero-2-cp": (2, zero(2, "parallel.cp=2"))}
MORE_ZERO = {
    "zero-1-sp": (2, zero(1, "parallel.tp=2", "parallel.sequence_parallel=true")),
    "zero-0-tp": (2, zero(0, "parallel.tp=2")),
    "zero-1-cp-dp": (4, zero(1, "parallel.cp=2")),
    "zero-3-cp-tp": (4, zero(3, "parallel.cp=2", "parallel.tp=2")),
    "zero-2-offload": (
        2,
        zero(2, f"engine.config={{zero_optimization: {{offload_optimizer: {ON_CPU}}}}}"),
    ),
    "zero-3-offload": (
        2,
        zero(
            3,
            f"engine.config={{zero_optimization: {{offload_optimizer: {ON_CPU}, "
            f"offload_param: {ON_CPU}}}}}",
        ),
    ),
    "zero-3-memory": (2, zero(3, "parallel.cp=2", "memory.recompute=full", "memory.mlp_tile=17")),
    "zero-3-selective": (
        2,
        zero(3, "memory.recompute=selective", "memory.recompute_blocks={full: none}"),
    ),
}
SEQUENCE = {"sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"])}
MORE_SEQUENCE = {
    "sp-cp": (4, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"]),
    "sp-pp": (4, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2"]),
    "sp-memory": (2, [*SEQUENCE["sp"][1], "memory.recompute=full", "memory.mlp_tile=11"]),
}
EP = {"cp-ep": (2, ["parallel.cp=2", "parallel.ep=2"])}
MORE_EP = {
    "dp": PAIRS["dp"],
    "dp-ep": (2, ["parallel.ep=2"]),
    "cp-ep-dp": (4, ["parallel.cp=2", "parallel.ep=4"]),
    "sp": SEQUENCE["sp"],
    "sp-ep": (2, [*SEQUENCE["sp"][1], "parallel.ep=2"]),
    "sp-cp-ep": (4, [*SEQUENCE["sp"][1], "parallel.cp=2", "parallel.ep=2"]),
    "pp-ep": (4, ["parallel.pp=2", "parallel.ep=2"]),
    "ep-memory": (2, ["parallel.ep=2", "memory.recompute=full"]),
    "zero-2-cp": (2, zero(2, "parallel.cp=2")),
    "zero-3-sp": (2, zero(3, "parallel.tp=2", "parallel.sequence_parallel=true")),
}
HEADS = {"tp": PAIRS["tp"], "cp-tp": CONTEXT["cp-tp"]}
STATES = {"tp": PAIRS["tp"], "cp": PAIRS["cp"]}
FEWER_STEPS = "training.steps=8"  # for what is slow on a CPU, or has 20 steps in the wide tests
MORE_STATES = {"dp": PAIRS["dp"], "pp": PAIRS["pp"], **CONTEXT, **MORE_CONTEXT}


@pytest.fixture
def train(ranks, tiny_recipe, tmp_path):
    def run(name: str, count: int, *overrides: str) -> dict:
        out = tmp_path / f"{name}.pt"
        ranks(count, WORKER, tiny_recipe, out, f"launch.processes={count}", *overrides)
        return torch.load(out, weights_only=False)

    return run


@pytest.mark.parametrize(
    ("model", "arrangements"),
    [
        (["model.tie_word_embeddings=true", FEWER_STEPS], PAIRS),
        pytest.param(["model.tie_word_embeddings=false"], PAIRS, marks=pytest.mark.wide),
        (["model.tie_word_embeddings=true", FEWER_STEPS], CONTEXT),
        ([FEWER_STEPS], ZERO),
        pytest.param(["model.tie_word_embeddings=false"], MORE_ZERO, marks=pytest.mark.wide),
        pytest.param(
            ["model.tie_word_embeddings=true"],
            {**GRID, **MORE_CONTEXT, **SCHEDULES},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            ["model.tie_word_embeddings=true"],
            {**SEQUENCE, **MORE_SEQUENCE},
            marks=pytest.mark.wide,
        ),
        ([*EXPERTS, FEWER_STEPS], EP),
        pytest.param(EXPERTS, MORE_EP, marks=pytest.mark.wide),
        pytest.param([*EXPERTS, FEWER_STEPS], ZERO, marks=pytest.mark.wide),
        pytest.param(
            SHARED_EXPERT,
            {**EP, **{name: MORE_EP[name] for name in ("sp-cp-ep", "zero-3-sp")}},
            marks=pytest.mark.wide,
        ),
        pytest.param([PATTERNS], {**HEADS, **SEQUENCE}, marks=pytest.mark.wide),
        pytest.param(
            [MOBA],
            {**PAIRS, **ZERO, "sp-memory": MORE_SEQUENCE["sp-memory"]},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            [MIXED],
            {"cp": PAIRS["cp"], "cp-4": SCHEDULES["cp-4"], **ZERO},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            [*LINEAR, FEWER_STEPS],
            {**STATES, **MORE_STATES, **GRID, **SEQUENCE},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            LINEAR_MORE,
            {**STATES, **MORE_STATES},
            marks=[pytest.mark.wide, pytest.mark.timeout(1800)],
        ),
    ],
    ids=[
        "tied",
        "untied",
        "context",
        "zero",
        "more zero",
        "schedules",
        "sequence",
        "experts",
        "more experts",
        "experts, zero",
        "shared expert",
        "patterns",
        "moba",
        "mixed",
        "linear",
        "more linear",
    ],
)
def test_every_arrangement_trains_the_same_model(train, model, arrangements):
    on_one_rank = train("alone", 1, *model)
    for name, (count, overrides) in arrangements.items():
        over_ranks = train(name, count, *model, *overrides)
        assert over_ranks["weights"].keys() == on_one_rank["weights"].keys()
        for key, weight in on_one_rank["weights"].items():
            assert torch.equal(over_ranks["weights"][key], weight), (name, key)
        for key, gradient in on_one_rank["gradients"].items():
            assert (over_ranks["gradients"][key] - gradient).norm() <= 1e-4 * gradient.norm(), (
                name,
                key,
            )
        for ours, expected in zip(over_ranks["steps"], on_one_rank["steps"], strict=True):
            assert (ours.tokens, ours.padding) == (expected.tokens, expected.padding)
            assert ours.loss == pytest.approx(expected.loss, rel=1e-5), name
            assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3), name
            assert ours.balance_loss == (
                expected.balance_loss and pytest.approx(expected.balance_loss, rel=1e-4)
            ), name
        sums = [
            (sum(e[0] for e in run["evaluations"]), sum(e[1] for e in run["evaluations"]))
            for run in (over_ranks, on_one_rank)
        ]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
        if "cp" in name:
            assert min(over_ranks["edges"].values()) > 0, (
                "documents should start on the edges of shards and inside them"
            )
        if "cp" in name or "dp" in name:
            assert any(
                len(set(counts)) > 1 for counts in zip(*over_ranks["local_tokens"], strict=True)
            ), "ranks should differ"
    assert on_one_rank["steps"][-1].loss < 0.9 * on_one_rank["steps"][0].loss


def test_bf16_trains_to_nearly_the_same_loss(train):
    exact = train("exact", 1, FEWER_STEPS)
    low = train("low", 2, FEWER_STEPS, "training.dtype=bfloat16", "parallel.cp=2")
    assert {weight.dtype for weight in low["weights"].values()} == {torch.bfloat16}
    for ours, expected in zip(low["steps"], exact["steps"], strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=2e-2)


def test_an_error_on_one_rank_ends_all_ranks(ranks, tmp_path):
    """After any exception, the other ranks do not wait until their connection breaks."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from longspan.launch.process import process_group\n"
        "from longspan.trainer.ranks import RankGroup\n"
        "with process_group(1):\n"
        "    with RankGroup().raise_on_all():\n"
        "        if dist.get_rank() == 1:\n"
        "            raise ValueError('met here')\n"
    )
    (_, first), (_, second) = ranks(2, script, status=1)
    assert first.splitlines()[-1] == "longspan.trainer.errors.SilentRankError"
    assert second.splitlines()[-1] == "ValueError: met here"


def test_our_layers_work_in_a_plain_megatron_script(ranks, tmp_path):
    script = Path(__file__).parents[3] / "docs" / "plain_megatron.py"
    losses = {}
    for count in (1, 2):
        ranks(count, script, tmp_path / f"{count}.pt")
        losses[count] = torch.load(tmp_path / f"{count}.pt")
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1][-1] < 0.7 * losses[1][0]
