"""What becomes of the learning rate when a run that has begun is given more steps."""

from typing import Literal, NamedTuple

WhenExtended = Literal["hold", "rewarm", "stretch"]


class Extension(NamedTuple):
    """A start of a run with more steps than it had before."""

    at_step: int
    """Steps done at that start."""
    old_steps: int
    """``training.steps`` before it."""
    learning_rate: WhenExtended
    """``training.lr_when_extended`` of the recipe that raised them."""
