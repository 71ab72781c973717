"""The learning rate of a run whose steps are raised after it has begun."""

import json

import pytest
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.extension import Extension
from longspan.trainer.recipe.file import load_recipe, to_yaml
from longspan.trainer.recipe.stages import Stages
from longspan.trainer.run.extend import extended_run

SCHEDULE = ["optimizer.lr=1e-3", "lr_scheduler={warmup_steps: 4, min_lr_factor: 0.1}"]


@pytest.fixture
def recipe(tiny_recipe):
    """``recipe(steps, *overrides)``."""

    def load(steps, *overrides):
        options = [f"training.steps={steps}", *SCHEDULE, *overrides]
        return load_recipe(str(tiny_recipe), options)

    return load


def rates(recipe, *extensions):
    stages = Stages(recipe, extensions)
    return [stages.learning_rate(step) for step in range(recipe.training.steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_without_extensions_nothing_changes(recipe, name):
    planned = rates(recipe(20, f"lr_scheduler.name={name}"))
    assert planned[-1] == pytest.approx(1e-4)
    assert rates(recipe(20, f"lr_scheduler.name={name}", "training.lr_when_extended=rewarm")) == (
        planned
    )


def test_hold_goes_on_at_the_rate_of_the_end(recipe):
    before = rates(recipe(20))
    assert rates(recipe(30), Extension(20, 20, "hold")) == [*before, *[before[-1]] * 10]
    twice = [Extension(20, 20, "hold"), Extension(30, 30, "hold")]
    assert rates(recipe(35), *twice) == [*before, *[before[-1]] * 15]


def test_hold_of_a_run_that_was_stopped_finishes_the_schedule_first(recipe):
    before = rates(recipe(20))
    assert rates(recipe(30), Extension(7, 20, "hold")) == [*before, *[before[-1]] * 10]


def test_hold_within_the_warmup_keeps_the_rate_that_was_reached(recipe):
    before = rates(recipe(3))
    assert before[-1] == pytest.approx(0.75e-3)
    assert rates(recipe(6), Extension(3, 3, "hold")) == [*before, *[before[-1]] * 3]


def test_rewarm_begins_the_schedule_again(recipe):
    before = rates(recipe(20))
    assert rates(recipe(30), Extension(20, 20, "rewarm")) == before + rates(recipe(10))
    stopped = rates(recipe(27), Extension(7, 20, "rewarm"))
    assert stopped == before[:7] + before  # the steps before keep the rates that they had


def test_stretch_is_the_schedule_of_a_longer_run(recipe):
    assert rates(recipe(30), Extension(20, 20, "stretch")) == rates(recipe(30))
    twice = [Extension(20, 20, "hold"), Extension(25, 25, "stretch")]
    assert rates(recipe(30), *twice) == rates(recipe(30))
    after_rewarm = [Extension(20, 20, "rewarm"), Extension(25, 25, "stretch")]
    assert rates(recipe(30), *after_rewarm) == rates(recipe(20)) + rates(recipe(10))


def test_a_stage_with_a_schedule_of_its_own_begins_that_schedule(recipe):
    stage = "stages=[{from_step: 20, lr_scheduler: {name: wsd, warmup_steps: 2}}]"
    without_extension = rates(recipe(30, stage))
    for policy in ("hold", "rewarm", "stretch"):
        assert rates(recipe(30, stage), Extension(20, 20, policy)) == without_extension


@pytest.fixture
def run(recipe):
    """``run(steps, steps_done)``: a folder of a run that has done these steps of its recipe."""

    def make(steps, steps_done):
        folder = RunFolder(recipe(steps).run_dir)
        folder.path.mkdir(exist_ok=True)
        folder.recipe_file.write_text(to_yaml(recipe(steps)))
        (folder.checkpoints / f"step-{steps_done:08}").mkdir(parents=True)
        return RunFolder(folder.path)

    return make


@pytest.mark.parametrize(
    ("policy", "rate"), [("hold", "0.0001"), ("rewarm", "0.00025"), ("stretch", "0.0003409")]
)
def test_both_rates_are_said_and_what_the_others_would_do(recipe, run, policy, rate):
    extended = extended_run(
        run(20, 20), recipe(30, f"training.lr_when_extended={policy}"), steps_done=20
    )
    assert extended.extensions == [Extension(20, 20, policy)]
    assert extended.notice.startswith(
        "training.steps: 20 before, 30 now; the learning rate was 0.0001 at step 20 "
        f"and is {rate} at step 21 (training.lr_when_extended: {policy}; "
    )
    for other in {"hold", "rewarm", "stretch"} - {policy}:
        assert f"{other} would make it " in extended.notice


def test_fewer_steps_are_said_too(recipe, run):
    extended = extended_run(run(20, 10), recipe(12), steps_done=10)
    assert extended.extensions == []
    before, after = rates(recipe(20))[9], rates(recipe(12))[10]
    assert f"the learning rate was {before:.4g} at step 10 and is {after:.4g} at step 11" in (
        extended.notice
    )


def test_the_same_command_again_says_nothing_and_changes_nothing(recipe, run):
    folder = run(20, 20)
    longer = recipe(30)
    first = extended_run(folder, longer, steps_done=20)
    folder.begin(longer, 20, {}, extensions=first.extensions)
    again = extended_run(RunFolder(folder.path), longer, steps_done=24)
    assert again == (first.extensions, None)
    # Another policy counts from the same place on.
    other = extended_run(
        RunFolder(folder.path), recipe(30, "training.lr_when_extended=rewarm"), steps_done=24
    )
    assert other.extensions == [Extension(20, 20, "rewarm")]
    assert "training.lr_when_extended: hold before, rewarm now; the learning rate was 0.0001" in (
        other.notice
    )


def test_a_run_without_a_checkpoint_has_nothing_to_go_on_from(recipe, run):
    assert extended_run(run(20, 0), recipe(30), steps_done=0) == ([], None)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "[{}]", json.dumps([{"at_step": 5, "old_steps": 4, "learning_rate": "hold"}])],
)
def test_a_damaged_record_of_extensions_is_named(recipe, run, content):
    folder = run(20, 20)
    (folder.path / "extensions.json").write_text(content)
    with pytest.raises(UserError, match=r"extensions\.json: is damaged"):
        extended_run(folder, recipe(30), steps_done=20)
