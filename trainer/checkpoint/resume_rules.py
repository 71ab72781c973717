"""Which recipes may continue a run: what may change from one start to the next."""

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

from ..recipe.schema import Recipe

_MAY_CHANGE = (
    "description",
    "run_dir",
    "training.steps",
    "training.lr_when_extended",
    "training.micro_batch_size",
    "training.on_nonfinite",
    "training.max_skipped_steps",
    "parallel",
    "engine",
    "memory",
    "checkpoint",
    "evaluation",
    "metrics",
    "launch",
)
"""Keys that a run does not learn from.

They say how it is computed, watched and kept, and how long it is.
"""


class Difference(NamedTuple):
    """A key that has another value in the new recipe."""

    key: str
    old: object
    new: object


def forbidden_changes(old: Recipe, new: Recipe, steps_done: int) -> Iterator[Difference]:
    """Yield what a run has learned from with the recipe ``old``, and ``new`` would change."""
    return _differences(_learned_from(old, steps_done), _learned_from(new, steps_done))


def _learned_from(recipe: Recipe, steps_done: int) -> dict:
    """Return the part of a recipe that must not change in a run that has done these steps."""
    content = recipe.model_dump(mode="json")
    for key in _MAY_CHANGE:
        if key == "training.micro_batch_size" and _balances_experts(recipe):
            continue  # the balance loss is a mean over the sequences of a microbatch
        *sections, name = key.split(".")
        section = reduce(dict.__getitem__, sections, content)
        del section[name]
    content["stages"] = [stage for stage in content["stages"] if stage["from_step"] < steps_done]
    return content


def _balances_experts(recipe: Recipe) -> bool:
    moe = recipe.model.moe
    return moe is not None and moe.router_aux_loss_coef > 0


def _differences(old: object, new: object, key: str = "") -> Iterator[Difference]:
    """Yield the dotted key and both values of all that differs between two nested mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".removeprefix("."))
    elif old != new:
        yield Difference(key, old, new)
