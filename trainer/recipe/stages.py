"""The stages of a run: which recipe is in force at a step, derived once from the run's recipe."""

from dataclasses import dataclass

from .learning_rate import learning_rate
from .schema import Recipe


@dataclass(frozen=True)
class Stage:
    """A part of the run during which one recipe is in force. All steps count from 0."""

    start: int
    """The first step of this stage."""
    recipe: Recipe
    """The run's recipe with the changes of this stage and of those before it."""
    data_start: int
    """The step at which the data of this stage begin.

    Earlier than ``start`` if the stage continues the data of the one before.
    """
    lr_start: int
    """The first step of the learning-rate schedule in force."""
    lr_stop: int
    """The step at which that schedule ends.

    The end of the run, or the next stage that has a schedule of its own.
    """

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this stage."""
        return learning_rate(
            step - self.lr_start,
            self.lr_stop - self.lr_start,
            self.recipe.optimizer.lr,
            self.recipe.lr_scheduler,
        )


class Stages:
    """All stages of a run in order; the first begins at step 0 and is the recipe as it stands."""

    def __init__(self, recipe: Recipe):
        self._stages = [_stage(recipe, start) for start in recipe.stage_starts]

    def at(self, step: int) -> Stage:
        """Return the stage that step ``step`` (from 0) belongs to."""
        return next(stage for stage in reversed(self._stages) if stage.start <= step)


def _stage(recipe: Recipe, start: int) -> Stage:
    data_starts = [stage.from_step for stage in recipe.stages if stage.changes_data]
    lr_starts = [stage.from_step for stage in recipe.stages if stage.lr_scheduler]
    return Stage(
        start=start,
        recipe=recipe.at_step(start),
        data_start=max((step for step in data_starts if step <= start), default=0),
        lr_start=max((step for step in lr_starts if step <= start), default=0),
        lr_stop=min((step for step in lr_starts if step > start), default=recipe.training.steps),
    )
