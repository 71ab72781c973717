"""The same model, data and losses however the ranks are arranged: real processes, against one rank."""

from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "parity_worker.py"
DEGREES = {"dp": [], "tp": ["parallel.tp=2"], "pp": ["parallel.pp=2"]}


@pytest.fixture
def train(ranks, tiny_recipe, tmp_path):
    def run(name: str, count: int, *overrides: str) -> dict:
        out = tmp_path / f"{name}.pt"
        ranks(count, WORKER, tiny_recipe, out, f"launch.processes={count}", *overrides)
        return torch.load(out, weights_only=False)

    return run


@pytest.mark.parametrize("tied", ["true", "false"])
def test_tensor_pipeline_and_data_parallel_train_the_same_model(train, tied):
    tied = f"model.tie_word_embeddings={tied}"
    alone = train("alone", 1, tied)
    for name, overrides in DEGREES.items():
        pair = train(name, 2, tied, *overrides)
        assert pair["weights"].keys() == alone["weights"].keys()
        for key, weight in alone["weights"].items():
            assert torch.equal(pair["weights"][key], weight), (name, key)
        for key, gradient in alone["gradients"].items():
            assert (pair["gradients"][key] - gradient).norm() <= 1e-4 * gradient.norm(), (name, key)
        for ours, expected in zip(pair["steps"], alone["steps"], strict=True):
            assert (ours.tokens, ours.padding) == (expected.tokens, expected.padding)
            assert ours.loss == pytest.approx(expected.loss, rel=1e-5), name
            assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3), name
        sums = [(sum(e[0] for e in run["evaluations"]), sum(e[1] for e in run["evaluations"])) for run in (pair, alone)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
        if name == "dp":
            assert any(len(set(counts)) > 1 for counts in zip(*pair["local_tokens"], strict=True)), "ranks should differ"
    assert alone["steps"][-1].loss < 0.9 * alone["steps"][0].loss


def test_bf16_trains_to_nearly_the_same_loss(train):
    exact = train("exact", 1)
    low = train("low", 2, "training.dtype=bfloat16")
    assert {weight.dtype for weight in low["weights"].values()} == {torch.bfloat16}
    for ours, expected in zip(low["steps"], exact["steps"], strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=2e-2)
