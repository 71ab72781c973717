"""The learning rate as a function of the step."""

import math
from typing import Annotated, Literal

from pydantic import Field

from ..layers.base import Fraction, Section


class LRSchedulerConfig(Section):
    name: Literal["cosine", "wsd"] = "cosine"
    """wsd: warmup, stable, then linear decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises to its peak."""
    decay_ratio: Fraction = 0.2
    """wsd: share of all steps in the final decay."""
    min_lr_factor: Fraction = 0.1
    """Share of the learning rate that is left at the end."""


def learning_rate(step: int, steps: int, peak: float, schedule: LRSchedulerConfig) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``.

    It warms up linearly to ``peak``, then follows a cosine, or stays and decays linearly at the end
    (wsd), down to ``peak * min_lr_factor``.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    decay_start: float = schedule.warmup_steps
    if schedule.name == "wsd":
        decay_start = max(decay_start, steps * (1 - schedule.decay_ratio))
    progress = (step + 1 - decay_start) / max(1, steps - decay_start)
    progress = min(1.0, max(0.0, progress))
    if schedule.name == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - progress
    return peak * (schedule.min_lr_factor + (1 - schedule.min_lr_factor) * remaining)
