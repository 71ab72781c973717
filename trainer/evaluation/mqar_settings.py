"""What a model that was trained on the recall task is asked: how long the examples are, and how many pairs they have."""

from dataclasses import dataclass

from ..errors import UserError
from ..recipe.schema import MQARConfig, Recipe


@dataclass(frozen=True)
class Setting:
    """What is asked of a model."""

    length: int
    pairs: int


def trained_settings(recipe: Recipe) -> list[Setting]:
    """Those that the model has seen, the hardest last."""
    stages = [stage for stage in map(recipe.at_step, recipe.stage_starts) if stage.data.mqar]
    seen = {
        Setting(stage.training.seq_length, pairs)
        for stage in stages
        for pairs in stage.data.mqar.pairs
    }
    return sorted(seen, key=lambda setting: (setting.length, setting.pairs))


def default_settings(recipe: Recipe) -> list[Setting]:
    """The trained ones; then twice and four times the hardest, where there are keys for them."""
    trained = trained_settings(recipe)
    longer = [Setting(times * trained[-1].length, times * trained[-1].pairs) for times in (2, 4)]
    return trained + [setting for setting in longer if _problem(setting, recipe.data.mqar) is None]


def settings_of(
    recipe: Recipe, lengths: list[int] | None, pairs: list[int] | None
) -> list[Setting]:
    """All of the ``lengths`` with all of the ``pairs`` that fit; None stands for those that were trained.

    Raises:
        UserError: where a length or a number of pairs that was asked for fits nothing, with the reason.
    """
    if lengths is None and pairs is None:
        return default_settings(recipe)
    every_length, every_pairs = (
        lengths or [recipe.training.seq_length],
        pairs or recipe.data.mqar.pairs,
    )
    grid = [
        Setting(length, count)
        for length in sorted(set(every_length))
        for count in sorted(set(every_pairs))
    ]
    problems = {setting: _problem(setting, recipe.data.mqar) for setting in grid}
    for option, field, values in (("--lengths", "length", lengths), ("--pairs", "pairs", pairs)):
        for value in values or ():
            own = [
                problem for setting, problem in problems.items() if getattr(setting, field) == value
            ]
            if None not in own:
                raise UserError(f"{option}: {value} fits nothing: {own[0]}")
    return [setting for setting, problem in problems.items() if problem is None]


def _problem(setting: Setting, task: MQARConfig) -> str | None:
    """Why there are no such examples."""
    if setting.length % 2:
        return f"{setting.length} tokens are odd; use an even length"
    if 4 * setting.pairs > setting.length:
        return f"{setting.pairs} pairs and their questions take {4 * setting.pairs} tokens; use that length or fewer pairs"
    if setting.pairs > task.keys:
        return f"data.mqar.vocab_size {task.vocab_size} has {task.keys} keys; use fewer pairs"
    return None
