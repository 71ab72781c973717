"""Collectives wait longer than the watchdog, whose report says which rank is where."""

import contextlib
from datetime import timedelta

import torch
import torch.distributed as dist
from longspan.launch.process import process_group
from longspan.trainer.engines.build import build_engine
from longspan.trainer.ranks import RankGroup
from longspan.trainer.recipe.file import load_recipe
from longspan.trainer.run.checkpointer import Checkpointer


def test_every_group_waits_twice_as_long_as_the_watchdog(tiny_recipe, tmp_path):
    recipe = load_recipe(str(tiny_recipe), ["launch.hang_timeout_s=4000"])
    expected = timedelta(seconds=8000)
    seconds = recipe.launch.collective_timeout_s
    with process_group(1, timeout_s=seconds), contextlib.closing(build_engine(recipe)):
        Checkpointer(tmp_path, 1, RankGroup(seconds))
        waits = [
            group._get_backend(torch.device("cpu")).options._timeout
            for group in dist.distributed_c10d._world.pg_map
        ]
    assert len(waits) > 5
    # Megatron-core counts in minutes.
    assert all(expected <= wait <= expected + timedelta(minutes=1) for wait in waits), waits
