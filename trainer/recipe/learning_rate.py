"""Learning rate as a function of the step."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import LRSchedulerConfig


def learning_rate(step: int, steps: int, peak: float, schedule: "LRSchedulerConfig") -> float:
    """Of step ``step`` (from 0) of ``steps``: linear warmup, then cosine, or constant with a linear decay at the end (wsd)."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    start = (
        schedule.warmup_steps
        if schedule.name == "cosine"
        else max(schedule.warmup_steps, steps * (1 - schedule.decay_ratio))
    )
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, steps - start)))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return peak * (schedule.min_lr_factor + (1 - schedule.min_lr_factor) * left)
