"""Keys of the DeepSpeed engine that conflict with the recipe or are unsupported."""

import re
from pathlib import Path

import pytest
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe

WORKER = Path(__file__).parents[1] / "run" / "run_worker.py"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine.config={gradient_clipping: 1.0}"],
            "engine.config.gradient_clipping: is training.max_grad_norm of the recipe",
        ),
        (
            ["engine.config={zero_optimisation: {}}"],
            "engine.config.zero_optimisation: unknown (did you mean zero_optimization?)",
        ),
        (
            ["engine.config={zero_optimization: {stage: 3}}"],
            "engine.config.zero_optimization.stage: is engine.zero_stage of",
        ),
        (
            ["engine.config={zero_optimization: {overlap_com: true}}"],
            "overlap_com: is not passed on (did you mean overlap_comm?)",
        ),
        (
            ["engine.config={zero_optimization: 3}"],
            "engine.config.zero_optimization: must be a section, got 3",
        ),
        (
            ["engine.config={zero_optimization: {offload_param: {device: cpu}}}"],
            "engine.config.zero_optimization.offload_param: needs engine.zero_stage 3, it is 1",
        ),
        (["launch.processes=2", "parallel.pp=2"], "parallel.pp: 2 needs engine megatron"),
        (
            ["engine.zero_stage=0", "training.dtype=bfloat16"],
            "engine.zero_stage: 0 adds up gradients in the weights' dtype",
        ),
        (["engine.zero_stage=4"], "engine.zero_stage: should be less than or equal to 3, got 4"),
        (
            ["engine.name=deepsped"],
            "engine: unknown name 'deepsped' (did you mean deepspeed?); known: megatron, deepspeed",
        ),
    ],
)
def test_conflicting_keys_are_refused_before_any_process_starts(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(str(tiny_recipe), ["engine.name=deepspeed", *overrides])
