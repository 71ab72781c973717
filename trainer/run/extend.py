"""A run that is started again with other steps: its learning rate, and what is said about it."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

from ..checkpoint.run_folder import RunFolder
from ..recipe.extension import Extension, WhenExtended
from ..recipe.schema import Recipe
from ..recipe.stages import Stages


class ExtendedRun(NamedTuple):
    """What a start knows of the starts before it."""

    extensions: list[Extension]
    """All that raised ``training.steps``, with this start if it does."""
    notice: str | None = None
    """A line about a learning rate that is not the one that was planned before."""


def extended_run(folder: RunFolder, recipe: Recipe, steps_done: int) -> ExtendedRun:
    """Return what raised the steps of a run since it began, and say what that means from here on.

    Args:
        folder: of the run, with the recipe of the start before this one, if there was one.
        recipe: with which the run is started now.
        steps_done: of the checkpoint that it resumes from.

    Raises:
        UserError: the folder's files are damaged.
    """
    if not steps_done or not folder.recipe_file.exists():
        return ExtendedRun([])
    recorded = folder.extensions()
    old_recipe = folder.recipe
    old_steps = old_recipe.training.steps

    extensions = list(recorded)
    if recipe.training.steps > old_steps:
        extensions.append(Extension(steps_done, old_steps, recipe.training.lr_when_extended))
    elif extensions and steps_done < old_steps:  # the newest one does what the recipe says now
        newest = extensions[-1]
        extensions[-1] = newest._replace(learning_rate=recipe.training.lr_when_extended)

    changed = _changed_key(old_recipe, recipe, has_extensions=bool(extensions))
    if changed is None or recipe.training.steps == steps_done:
        return ExtendedRun(extensions)
    rate_before = Stages(old_recipe, recorded).learning_rate(steps_done - 1)
    return ExtendedRun(
        extensions, f"{changed}; {_rates(recipe, extensions, steps_done, rate_before)}"
    )


def _changed_key(old: Recipe, new: Recipe, has_extensions: bool) -> str | None:
    """Return which key changes the learning rate of later steps, with both values, if one does."""
    if old.training.steps != new.training.steps:
        return f"training.steps: {old.training.steps} before, {new.training.steps} now"
    policies = (old.training.lr_when_extended, new.training.lr_when_extended)
    if has_extensions and policies[0] != policies[1]:
        return f"training.lr_when_extended: {policies[0]} before, {policies[1]} now"
    return None


def _rates(
    recipe: Recipe, extensions: Sequence[Extension], steps_done: int, rate_before: float
) -> str:
    """Return the learning rates of the last step and of the next one, with what others would do."""
    rate_now = Stages(recipe, extensions).learning_rate(steps_done)
    line = (
        f"the learning rate was {rate_before:.4g} at step {steps_done} and is {rate_now:.4g} "
        f"at step {steps_done + 1}"
    )
    if not extensions:
        return line
    alternatives = []
    for policy in get_args(WhenExtended):
        if policy != extensions[-1].learning_rate:
            others = [*extensions[:-1], extensions[-1]._replace(learning_rate=policy)]
            rate = Stages(recipe, others).learning_rate(steps_done)
            alternatives.append(f"{policy} would make it {rate:.4g}")
    chosen = extensions[-1].learning_rate
    return f"{line} (training.lr_when_extended: {chosen}; {', '.join(alternatives)})"
