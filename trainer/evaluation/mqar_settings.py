"""The lengths and numbers of pairs that a trained model is asked about in the recall task."""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from ..recipe.schema import MQARConfig, Recipe


@dataclass(frozen=True)
class RecallSetting:
    """The shape of some examples."""

    length: int
    """In tokens."""
    pairs: int


def recall_task(recipe: Recipe) -> MQARConfig:
    """Return the recall task that a recipe trains on; it must have one."""
    assert recipe.data.mqar is not None, "the recipe has no data.mqar"
    return recipe.data.mqar


def trained_settings(recipe: Recipe) -> list[RecallSetting]:
    """Return the settings that the model was trained in, the hardest last."""
    stages = [recipe.at_step(start) for start in recipe.stage_starts]
    settings = {
        RecallSetting(stage.training.seq_length, pairs)
        for stage in stages
        if stage.data.mqar
        for pairs in stage.data.mqar.pairs
    }
    return sorted(settings, key=lambda setting: (setting.length, setting.pairs))


def default_settings(recipe: Recipe) -> list[RecallSetting]:
    """Return the trained settings, then two and four times the hardest one if they are possible."""
    trained = trained_settings(recipe)
    hardest = trained[-1]
    harder = [RecallSetting(factor * hardest.length, factor * hardest.pairs) for factor in (2, 4)]
    task = recall_task(recipe)
    return trained + [setting for setting in harder if _problem(setting, task) is None]


def choose_settings(
    recipe: Recipe, lengths: list[int] | None, pairs: list[int] | None
) -> list[RecallSetting]:
    """Combine all ``lengths`` with all ``pairs``, as far as they fit each other.

    None stands for the trained length or pairs; if both are None, for the default settings.

    Raises:
        UserError: if a length or a number of pairs fits none of the others, with the reason.
    """
    if lengths is None and pairs is None:
        return default_settings(recipe)
    task = recall_task(recipe)
    problems = {
        RecallSetting(length, num_pairs): _problem(RecallSetting(length, num_pairs), task)
        for length in sorted(set(lengths or [recipe.training.seq_length]))
        for num_pairs in sorted(set(pairs or task.pairs))
    }
    _require_use("--lengths", lengths, problems, lambda setting: setting.length)
    _require_use("--pairs", pairs, problems, lambda setting: setting.pairs)
    return [setting for setting, problem in problems.items() if problem is None]


def _require_use(
    option: str,
    values: list[int] | None,
    problems: dict[RecallSetting, str | None],
    value_of: Callable[[RecallSetting], int],
) -> None:
    """Refuse a value of an option that is in no possible setting."""
    for value in values or ():
        reasons = [problem for setting, problem in problems.items() if value_of(setting) == value]
        if None not in reasons:
            raise UserError(f"{option}: {value} is not possible: {reasons[0]}")


def _problem(setting: RecallSetting, task: MQARConfig) -> str | None:
    """Return why there are no such examples, or None if there are."""
    if setting.length % 2:
        return f"an example needs an even number of tokens, not {setting.length}"
    tokens_needed = 4 * setting.pairs
    if tokens_needed > setting.length:
        return (
            f"{setting.pairs} pairs and their questions take {tokens_needed} tokens; "
            "use that length or fewer pairs"
        )
    if setting.pairs > task.keys:
        return f"data.mqar.vocab_size {task.vocab_size} has {task.keys} keys; use fewer pairs"
    return None
