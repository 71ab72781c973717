"""What a recipe's context parallelism moves: which tokens ranks hold, and the KV schedules."""

from typing import NamedTuple

from ...attention.patterns import Pattern, Selector
from ...parallel import Layout
from ...parallel.schedules.balance import balance
from ...parallel.schedules.choose import choose_schedule, cost
from ...parallel.schedules.names import Schedule, schedules_named
from ..recipe.schema import Recipe


def recipe_layout(recipe: Recipe, length: int | None = None) -> Layout:
    """Return which context-parallel rank holds which tokens of a sequence of ``length`` tokens, or
    of the recipe's length.
    """
    make = Layout.zigzag if recipe.parallel.layout == "zigzag" else Layout.contiguous
    return make(length or recipe.training.seq_length, recipe.parallel.cp)


class Choice(NamedTuple):
    """The KV schedule of a block, and what it and the others that can do the block cost."""

    block: str
    schedule: Schedule
    received: dict[Schedule, int]
    """Bytes that the rank which receives most receives in one layer, forward and backward."""
    work: dict[Schedule, float]
    """Work of the rank with most, over the mean of all."""
    buffer: int
    """Bytes of others' keys and values that a rank holds at a time."""

    def __str__(self) -> str:
        by_bytes = sorted(self.received, key=self.received.__getitem__)
        rivals = [f"{each} {self._cost(each)}" for each in by_bytes if each != self.schedule]
        return (
            f"{self.block}: schedule {self.schedule}, {self._cost(self.schedule)} "
            f"a layer and rank (others: {'; '.join(rivals) or 'none'})"
        )

    def _cost(self, schedule: Schedule) -> str:
        text = f"{self.received[schedule] / 2**20:,.1f} MiB"
        work = self.work[schedule]
        return f"{text}, work x {work:.2f}" if work > 1.02 else text


def choices(recipe: Recipe, bytes_per_number: int) -> list[Choice]:
    """Return the choice for every block with softmax attention that the model has."""
    patterns = {
        name: recipe.model.layers.blocks[name].attention_pattern(recipe.model.kv_heads)
        for name in dict.fromkeys(recipe.model.stack_names)
    }
    return [
        _choice(recipe, name, pattern, bytes_per_number)
        for name, pattern in patterns.items()
        if pattern is not None
    ]


def _choice(
    recipe: Recipe, name: str, pattern: Pattern | Selector, bytes_per_number: int
) -> Choice:
    model, parallel = recipe.model, recipe.parallel
    layout = recipe_layout(recipe)
    heads = model.num_attention_heads // parallel.tp
    kv_heads = model.kv_heads // parallel.tp
    head_dims = model.kv_channels, model.kv_channels  # of keys and of values
    chosen = choose_schedule(
        parallel.schedule_of(name), layout, pattern, heads, kv_heads, head_dims
    )
    able = [
        schedule
        for schedule in schedules_named("auto", parallel.cp)
        if not schedule.unsupported_reason(parallel.cp, pattern, heads, kv_heads)
    ]
    # A set's order would differ from run to run.
    schedules = list(dict.fromkeys([chosen, *able]))
    costs = {
        schedule: cost(schedule, layout, pattern, heads, kv_heads, head_dims)
        for schedule in schedules
    }
    bytes_each = bytes_per_number * recipe.training.micro_batch_size
    return Choice(
        block=name,
        schedule=chosen,
        received={schedule: each.received * bytes_each for schedule, each in costs.items()},
        work={
            schedule: balance(schedule, layout, pattern, heads, kv_heads) for schedule in schedules
        },
        buffer=costs[chosen].buffer * bytes_each,
    )
