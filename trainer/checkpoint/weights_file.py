"""``weights.safetensors`` of a run: the whole weights by global name, and the step they are of."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_weights(file: Path, weights: dict[str, "Tensor"], step: int) -> None:
    """Write the weights after ``step``, whole or not at all.

    Raises:
        UserError: they could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_suffix(".partial")
    try:
        save_file(weights, partial, {"step": str(step)})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.rename(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        again = "the checkpoint is whole: the same command writes the weights again"
        raise UserError(f"{file}: could not be written: {error}; {again}") from None


def weights_step(file: Path) -> int | None:
    """Return the step that the weights are of, or None if there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            return int(weights.metadata()["step"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None
