"""What a recipe's context parallelism moves: which rank holds which tokens, and the KV schedules."""

from typing import NamedTuple

from ...parallel import Layout
from ...parallel.schedules.balance import balance
from ...parallel.schedules.choose import choose_schedule, cost
from ...parallel.schedules.names import Schedule, named, unsupported_reason
from ..recipe.schema import Recipe


def recipe_layout(recipe: Recipe, length: int | None = None) -> Layout:
    """Return which context-parallel rank holds which tokens of a sequence of ``length`` tokens, or
    of the recipe's length.
    """
    make = Layout.zigzag if recipe.parallel.layout == "zigzag" else Layout.contiguous
    return make(length or recipe.training.seq_length, recipe.parallel.cp)


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


def choices(recipe: Recipe, bytes_per_number: int) -> list[Choice]:
    """Of every block with softmax attention that the model has."""
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
