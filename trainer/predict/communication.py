"""What a recipe's context parallelism comes to: whether its schedules can do its layers, and what they move. Without torch
until it is reckoned.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ...parallel.schedules.names import Schedule, named, unsupported_reason
from ..errors import suggest

if TYPE_CHECKING:
    from ..recipe.schema import ModelConfig, ParallelConfig, Recipe


def schedule_problems(
    model: "ModelConfig", parallel: "ParallelConfig"
) -> Iterator[tuple[str, str]]:
    """(key, reason and fix) of every schedule that is no name, or cannot do the layers that it is for."""
    blocks = model.layers.blocks
    for name in parallel.schedules:
        if name not in blocks:
            yield (
                f"parallel.schedules.{name}",
                f"names no block{suggest(name, list(blocks))}; known: {', '.join(blocks)}",
            )
        elif not blocks[name].has_kv_schedule:
            yield (
                f"parallel.schedules.{name}",
                f"is for softmax attention, but the block is {blocks[name].kind()}; remove it",
            )
    chosen = {"schedule": parallel.schedule} | {
        f"schedules.{name}": schedule for name, schedule in parallel.schedules.items()
    }
    faulty = set()
    for key, schedule in chosen.items():
        try:
            named(schedule, parallel.cp)
        except ValueError as error:
            faulty.add(schedule)
            yield f"parallel.{key}", str(error)
    for name, block in blocks.items() if parallel.cp > 1 else ():
        schedule = parallel.schedule_of(name)
        if not block.has_kv_schedule or schedule in faulty:
            continue
        try:
            pattern = block.attention_pattern(model.kv_heads)
        except ValueError:  # a problem of the model
            continue
        heads = (
            max(1, model.num_attention_heads // parallel.tp),
            max(1, model.kv_heads // parallel.tp),
        )
        reasons = [
            unsupported_reason(one, parallel.cp, pattern, *heads)
            for one in named(schedule, parallel.cp)
        ]
        if all(reasons):
            key = f"schedules.{name}" if name in parallel.schedules else "schedule"
            reason = next(iter(reasons), f"parallel.cp {parallel.cp} is no grid; take ring")
            yield f"parallel.{key}", f"{schedule} cannot do model.layers.blocks.{name}: {reason}"


class Choice(NamedTuple):
    """The schedule of a block, and what it and the others that can do it take."""

    block: str
    schedule: Schedule
    received: dict[Schedule, int]
    """Bytes a layer, forward and backward, that the rank which receives most receives."""
    work: dict[Schedule, float]
    """That of the rank with most, over the mean."""
    buffer: int
    """Bytes of others' keys and values that a rank holds at a time."""

    def __str__(self) -> str:
        taken = {
            one: f"{self.received[one] / 2**20:,.1f} MiB"
            for one in sorted(self.received, key=self.received.__getitem__)
        }
        taken = {
            one: f"{text}, work x {self.work[one]:.2f}" if self.work[one] > 1.02 else text
            for one, text in taken.items()
        }
        others = "; ".join(f"{one} {text}" for one, text in taken.items() if one != self.schedule)
        return f"{self.block}: schedule {self.schedule}, {taken[self.schedule]} a layer and rank (others: {others or 'none'})"


def choices(recipe: "Recipe", bytes_per_number: int) -> list[Choice]:
    """Of every block with softmax attention that the model has."""
    from ...parallel.schedules.balance import balance
    from ...parallel.schedules.choose import choose_schedule, cost
    from ..data.batches import recipe_layout

    model, parallel, found = recipe.model, recipe.parallel, []
    layout, heads, kv_heads = (
        recipe_layout(recipe),
        model.num_attention_heads // parallel.tp,
        model.kv_heads // parallel.tp,
    )
    dims = model.kv_channels, model.kv_channels
    for name in dict.fromkeys(model.stack_names):
        block = model.layers.blocks[name]
        pattern = block.attention_pattern(model.kv_heads)
        if pattern is None:
            continue
        chosen = choose_schedule(parallel.schedule_of(name), layout, pattern, heads, kv_heads, dims)
        able = [
            one
            for one in named("auto", parallel.cp)
            if not unsupported_reason(one, parallel.cp, pattern, heads, kv_heads)
        ]
        bytes_of = bytes_per_number * recipe.training.micro_batch_size
        costs = {one: cost(one, layout, pattern, heads, kv_heads, dims) for one in {chosen, *able}}
        moved = {one: each.received * bytes_of for one, each in costs.items()}
        work = {one: balance(one, layout, pattern, heads, kv_heads) for one in costs}
        found.append(Choice(name, chosen, moved, work, costs[chosen].buffer * bytes_of))
    return found
