"""The factor of the loss under which gradients fit fp16 (arXiv 1710.03740, section 3.2).

fp16 has 5 bits of exponent: gradients below 6e-8 become 0, those above 65,504 infinite. So the loss
is multiplied, as much as gradients allow, and fp32 gradients are divided by the same.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST = 2.0**16
_GROWTH_INTERVAL = 2000
"""Updates in a row after which the factor is doubled; both as in ``torch.amp.GradScaler``."""


class ScaledStep(NamedTuple):
    """What became of the factor in a step; the same on every rank."""

    scale: float
    """For the next step."""
    overflowed: bool
    """Whether gradients were too large only because of the factor, which is smaller now."""
    overflows: int
    """Number of such steps since step 0."""


class LossScale:
    """The factor, a power of two: it doubles after many updates, and halves if gradients overflow.

    The same on every rank, as whether gradients are finite is.
    """

    def __init__(self) -> None:
        self.scale = _FIRST
        self._updates = 0
        """Since the factor changed."""
        self._overflows = 0

    def after_step(self, loss_sum: float, grad_norm: float) -> ScaledStep:
        """Change the factor for the next step.

        At a factor of 1, and if the loss itself is not finite, a smaller one would not help: such a
        step is no overflow.
        """
        overflowed = False
        if math.isfinite(loss_sum) and math.isfinite(grad_norm):
            self._updates += 1
            if self._updates == _GROWTH_INTERVAL:
                self.scale *= 2
                self._updates = 0
        elif math.isfinite(loss_sum) and self.scale > 1:
            overflowed = True
            self.scale /= 2
            self._updates = 0
            self._overflows += 1
        return ScaledStep(self.scale, overflowed, self._overflows)

    @property
    def state(self) -> Tensor:
        """All of it, fp64 ``[3]``, for a checkpoint."""
        return torch.tensor([self.scale, self._updates, self._overflows], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Take over a :attr:`state`."""
        self.scale, updates, overflows = state.tolist()
        self._updates = int(updates)
        self._overflows = int(overflows)
