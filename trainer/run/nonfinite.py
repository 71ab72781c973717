"""What to do with a step whose loss or gradient is NaN or infinite."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..data.batches import Microbatch
from ..engines.engine import StepResult
from ..errors import NonFiniteError
from ..recipe.schema import TrainingConfig


class NonFinitePolicy:
    """Counts the steps without an update; the same on every rank, as their results are."""

    def __init__(self, training: TrainingConfig, folder: Path):
        self._training, self._folder, self._in_a_row = training, folder, 0

    def check(self, step: int, result: StepResult, batches: list[Microbatch], rank: int) -> bool:
        """Whether the update was made. Where it was not and the recipe says stop, this rank's batches are written.

        Raises:
            NonFiniteError: where the run must stop.
        """
        if result.updated:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        skipping = self._training.on_nonfinite == "skip"
        if skipping and self._in_a_row <= self._training.max_skipped_steps:
            return False
        file = self._folder / f"step-{step:08}" / f"rank-{rank}.safetensors"
        what = f"step {step}: loss {result.loss} and gradient norm {result.grad_norm}; no update was made"
        where = f"the batch is in {file.parent}/"
        try:
            _write(file, batches)
        except (OSError, SafetensorError) as error:
            where = f"the batch could not be written: {error}"
        if skipping:
            hint = f"{self._in_a_row} steps in a row, training.max_skipped_steps is {self._training.max_skipped_steps}"
        else:
            hint = "training.on_nonfinite=skip goes past it"
        raise NonFiniteError(f"{what}; {where}; {hint}" if rank == 0 else "")


def _write(file: Path, batches: list[Microbatch]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for i, batch in enumerate(batches):
        parts = {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "weights": batch.weights,
            "documents": batch.sequence.documents,
        }
        tensors |= {f"{i}.{name}": tensor.cpu().contiguous() for name, tensor in parts.items()}
    save_file(tensors, file)
