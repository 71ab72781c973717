"""Engines that follow one another in a process: nothing of one is left when it is closed."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from longspan.launch.process import process_group
from longspan.trainer.data.batches import Batches
from longspan.trainer.data.prepare import prepare_data
from longspan.trainer.data.tokenizer import recipe_vocab_size
from longspan.trainer.engines.build import build_engine
from longspan.trainer.recipe.file import load_recipe

from ..stacks import SHARED_EXPERT


def counts() -> dict[str, int]:
    """Return how many process groups, threads and open files this process has."""
    return {
        "groups": len(dist.distributed_c10d._world.pg_map),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }


def left_by_engines(recipe, number: int) -> Iterator[dict[str, int]]:
    """Yield the counts before the first engine and after each, which has made one step."""
    data = prepare_data(recipe)
    vocab_size = recipe_vocab_size(recipe)
    for _ in range(number):
        yield counts()
        engine = build_engine(recipe)
        assert counts()["groups"] > 10
        batches = Batches(recipe, data, vocab_size, engine.batch_shard, engine.device)
        assert engine.step(list(batches.step(0)), 1e-3).updated
        del batches  # and the files of its corpus
        engine.close()
    yield counts()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
@pytest.mark.parametrize("number", [4, pytest.param(10, marks=pytest.mark.wide)])
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_engines_leave_nothing(tiny_recipe, engine, number):
    recipe = load_recipe(
        str(tiny_recipe),
        [*SHARED_EXPERT, f"engine.name={engine}", "training.global_batch_size=1"],
    )
    with process_group(1):
        first, second, *others = left_by_engines(recipe, number)
    assert second["groups"] == first["groups"] == 1
    assert second["threads"] == first["threads"]
    # What libraries open once for the whole process, at their first use.
    assert second["files"] <= first["files"] + 2
    assert others == [second] * len(others)
