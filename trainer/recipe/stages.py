"""The stages of a run: which recipe is in force at a step, derived once from the run's recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .extension import Extension
from .learning_rate import learning_rate
from .schema import Recipe


class Schedule(NamedTuple):
    """A learning-rate schedule of the run. It is in force until the next one begins."""

    start: int
    """Its first step."""
    stop: int
    """The step at which it has ended; later steps keep the rate of its last one."""


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
    schedules: tuple[Schedule, ...]
    """Those of the whole run, in order."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this stage."""
        schedule = next(each for each in reversed(self.schedules) if each.start <= step)
        return learning_rate(
            min(step, schedule.stop - 1) - schedule.start,
            schedule.stop - schedule.start,
            self.recipe.optimizer.lr,
            self.recipe.lr_scheduler,
        )


class Stages:
    """All stages of a run in order; the first begins at step 0 and is the recipe as it stands.

    Args:
        extensions: what raised ``training.steps`` of the run since it began, in order.
    """

    def __init__(self, recipe: Recipe, extensions: Sequence[Extension] = ()):
        schedules = _schedules(recipe, extensions)
        self._stages = [_stage(recipe, start, schedules) for start in recipe.stage_starts]

    def at(self, step: int) -> Stage:
        """Return the stage that step ``step`` (from 0) belongs to."""
        return next(stage for stage in reversed(self._stages) if stage.start <= step)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 0)."""
        return self.at(step).learning_rate(step)


def _stage(recipe: Recipe, start: int, schedules: tuple[Schedule, ...]) -> Stage:
    data_starts = [stage.from_step for stage in recipe.stages if stage.changes_data]
    return Stage(
        start=start,
        recipe=recipe.at_step(start),
        data_start=max((step for step in data_starts if step <= start), default=0),
        schedules=schedules,
    )


def _schedules(recipe: Recipe, extensions: Sequence[Extension]) -> tuple[Schedule, ...]:
    """Return the learning-rate schedules of a run in order.

    Planned ones begin at step 0 and with every stage that has a schedule of its own, and end where
    the next one begins, the last with the run. An extension concerns the schedule that was the last
    one before it.
    """
    planned_starts = [0, *(stage.from_step for stage in recipe.stages if stage.lr_scheduler)]

    def planned_stop(start: int) -> int:
        later = (other for other in planned_starts if other > start)
        return min(later, default=recipe.training.steps)

    stops = {start: planned_stop(start) for start in planned_starts}
    for extension in extensions:
        last = max(start for start in stops if start < extension.old_steps)
        rewarms = extension.learning_rate == "rewarm"
        if extension.learning_rate == "stretch" or (rewarms and last >= extension.at_step):
            stops[last] = planned_stop(last)  # it is still to begin, or to be longer
            continue
        stops[last] = min(stops[last], extension.old_steps)
        if rewarms:
            stops.setdefault(extension.at_step, planned_stop(extension.at_step))
    return tuple(Schedule(start, stops[start]) for start in sorted(stops))
