"""float16 with a scaled loss, on a CPU: against fp32, through overflows, and resumed."""

import contextlib
import json
import math

import pytest
import torch
from longspan.launch.process import process_group
from longspan.trainer.engines.loss_scale import LossScale
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe
from longspan.trainer.recipe.schema import auto_dtype
from longspan.trainer.run.nonfinite import NonFinitePolicy

LR = 1e-3
ENGINES = [
    "megatron",
    pytest.param("deepspeed", marks=pytest.mark.wide),
    pytest.param("deepspeed, zero_stage: 2", marks=pytest.mark.wide),
    pytest.param("deepspeed, zero_stage: 3", marks=pytest.mark.wide),
]


@contextlib.contextmanager
def training(recipe_file, engine, dtype="float16"):
    """Yield an engine and the microbatches of a step."""
    from longspan.trainer.data.batches import Batches
    from longspan.trainer.data.prepare import prepare_data
    from longspan.trainer.data.tokenizer import recipe_vocab_size
    from longspan.trainer.engines.build import build_engine

    recipe = load_recipe(
        str(recipe_file), [f"training.dtype={dtype}", f"engine={{name: {engine}}}"]
    )
    data = prepare_data(recipe)
    vocab_size = recipe_vocab_size(recipe)
    with process_group(2), contextlib.closing(build_engine(recipe)) as built:
        batches = Batches(recipe, data, vocab_size, built.batch_shard, built.device)
        yield built, lambda step: list(batches.step(step))


@pytest.fixture(autouse=True)
def float16_on_any_cpu(monkeypatch):
    """DeepSpeed asks for CPUs that multiply fp16 fast."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)


@pytest.mark.parametrize("engine", ENGINES)
def test_updates_are_those_of_fp32_and_overflows_make_none(tiny_recipe, engine):
    with training(tiny_recipe, engine, "float32") as (reference, batches):
        expected = [reference.step(batches(step), LR) for step in range(3)]

    with training(tiny_recipe, engine) as (half, batches):
        assert half.dtype == torch.float16
        half.loss_scale.scale = 2.0**24
        before = weights_and_moments(half)
        overflow = half.step(batches(0), LR)
        assert overflow.loss == pytest.approx(expected[0].loss, rel=1e-3)
        assert (overflow.updated, overflow.scaled) == (False, (2.0**23, True, 1))
        assert all(map(torch.equal, before, weights_and_moments(half)))

        half.loss_scale.scale = 2.0**10
        results = [half.step(batches(step), LR) for step in range(3)]
    for result, reference_result in zip(results, expected, strict=True):
        assert result.updated
        assert result.scaled == (2.0**10, False, 1)
        assert result.loss == pytest.approx(reference_result.loss, rel=2e-3)
        assert result.grad_norm == pytest.approx(reference_result.grad_norm, rel=2e-2)


def weights_and_moments(engine):
    return [
        box.data.clone()
        for name, shards in sorted(engine.state().items())
        if not name.startswith(("rng.", "optimizer.loss_scale"))
        for box in shards.boxes
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_the_first_step_do_not_depend_on_the_factor(tiny_recipe, engine):
    with training(tiny_recipe, engine) as (half, batches):
        gradients = []
        for scale in (2.0**6, 2.0**10):
            half.loss_scale.scale = scale
            gradients.append(half.gradients(batches(0)))
    first, second = gradients
    for name, gradient in first.items():
        assert (gradient - second[name]).norm() <= 2e-2 * gradient.norm(), name


@pytest.mark.wide
@pytest.mark.parametrize("engine", ["megatron", "deepspeed, zero_stage: 2"])
def test_the_factor_is_resumed(tiny_recipe, engine):
    with training(tiny_recipe, engine) as (half, batches):
        half.step(batches(0), LR)
        kept = {name: shards.snapshot() for name, shards in half.state().items()}
        expected = [half.step(batches(step), LR) for step in (1, 2)]
    with training(tiny_recipe, engine) as (resumed, batches):
        state = resumed.state()
        for name, shards in kept.items():
            for box, kept_box in zip(state[name].boxes, shards.boxes, strict=True):
                box.data.copy_(kept_box.data)
        resumed.load_state(state)
        assert [str(resumed.step(batches(step), LR)) for step in (1, 2)] == list(map(str, expected))


def test_the_factor_grows_and_falls():
    loss_scale = LossScale()
    for _ in range(1999):
        assert loss_scale.after_step(1.0, 1.0) == (2.0**16, False, 0)
    assert loss_scale.after_step(1.0, 1.0) == (2.0**17, False, 0)
    assert loss_scale.after_step(1.0, math.inf) == (2.0**16, True, 1)

    resumed = LossScale()
    resumed.load(loss_scale.state)
    assert vars(resumed) == vars(loss_scale)
    # A smaller factor helps neither a loss that is not finite nor gradients of the loss itself.
    assert resumed.after_step(math.nan, math.nan) == (2.0**16, False, 1)
    resumed.scale = 1.0
    assert resumed.after_step(1.0, math.inf) == (1.0, False, 1)


def test_an_overflow_is_no_reason_to_stop(tmp_path):
    from longspan.trainer.engines.engine import StepResult

    recipe = load_recipe("quickstart")
    policy = NonFinitePolicy(recipe.training, tmp_path)
    loss_scale = LossScale()
    results = [
        StepResult(1.0, 1, 0, math.inf, False, None, loss_scale.after_step(1.0, math.inf))
        for _ in range(17)
    ]
    assert [policy.must_stop(result) for result in results] == [False] * 16 + [True]


def test_gpus_without_bfloat16_get_float16():
    devices = (None, 0, 70, 75, 80, 90, 120)
    assert [auto_dtype(capability) for capability in devices] == [
        "float32", "bfloat16", "float16", "float16", "bfloat16", "bfloat16", "bfloat16",
    ]  # fmt: skip


def test_deepspeed_without_float16_is_refused(tiny_recipe, monkeypatch):
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: False)
    message = r"training\.dtype: DeepSpeed has no float16 on this device"
    with pytest.raises(UserError, match=message), training(tiny_recipe, "deepspeed"):
        pass


@pytest.mark.wide
def test_a_run_is_reported_evaluated_continued_and_exported(longspan, tiny_recipe, tmp_path):
    run = tmp_path / "run"
    recipe = [tiny_recipe, "training.dtype=float16", "training.steps=4", "metrics.log_interval=1"]
    trained = longspan("train", *recipe)
    assert trained.returncode == 0, trained.stderr
    assert "gradients overflow float16; the loss is scaled by 32,768: skipped" in trained.stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(record.get("train/skipped", 0) for record in records) == 2
    last = [record for record in records if "train/loss_scale" in record][-1]
    assert (last["train/loss_scale"], last["train/overflows"]) == (2**14, 2)

    for command in (["generate", run, "--tokens", "4"], ["export", run, tmp_path / "exported"]):
        completed = longspan(*command)
        assert completed.returncode == 0, completed.stderr
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["dtype"] == "float16"
