"""Whether the KV schedules that a recipe names can do its layers."""

from ...attention.patterns import Pattern, Selector
from ...parallel.schedules.names import named, unsupported_reason
from ..errors import suggest
from .problem import Problem, Problems
from .schema import ModelConfig, ParallelConfig


def schedule_problems(model: ModelConfig, parallel: ParallelConfig) -> Problems:
    """Yield every schedule that is unknown, is for no block, or cannot do a block that it is for."""
    blocks = model.layers.blocks
    for name in parallel.schedules:
        key = f"parallel.schedules.{name}"
        if name not in blocks:
            suggestion = suggest(name, list(blocks))
            yield Problem(key, f"is not a block{suggestion}; known: {', '.join(blocks)}")
        elif not blocks[name].has_kv_schedule:
            kind = blocks[name].kind()
            reason = f"is for softmax attention, but the block is {kind}; remove it"
            yield Problem(key, reason)

    unknown = set()
    schedules = {f"schedules.{name}": value for name, value in parallel.schedules.items()}
    for key, schedule in {"schedule": parallel.schedule, **schedules}.items():
        try:
            named(schedule, parallel.cp)
        except ValueError as error:
            unknown.add(schedule)
            yield Problem(f"parallel.{key}", str(error))

    if parallel.cp == 1:
        return
    for name, block in blocks.items():
        schedule = parallel.schedule_of(name)
        if schedule in unknown:
            continue
        try:
            pattern = block.attention_pattern(model.kv_heads)
        except ValueError:  # a problem of the model
            continue
        if pattern is None:
            continue
        if refusal := _why_none_can(schedule, pattern, model, parallel):
            key = f"schedules.{name}" if name in parallel.schedules else "schedule"
            reason = f"{schedule} cannot do model.layers.blocks.{name}: {refusal}"
            yield Problem(f"parallel.{key}", reason)


def _why_none_can(
    schedule: str, pattern: Pattern | Selector, model: ModelConfig, parallel: ParallelConfig
) -> str | None:
    """Return why none of the schedules of that name can do the pattern, or None if one can."""
    local_heads = max(1, model.num_attention_heads // parallel.tp)
    local_kv_heads = max(1, model.kv_heads // parallel.tp)
    reason = f"parallel.cp {parallel.cp} cannot form a grid; use ring"
    for number, candidate in enumerate(named(schedule, parallel.cp)):
        refusal = unsupported_reason(candidate, parallel.cp, pattern, local_heads, local_kv_heads)
        if refusal is None:
            return None
        if number == 0:
            reason = refusal
    return reason
