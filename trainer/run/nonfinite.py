"""What to do with a step whose loss or gradient is NaN or infinite."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..data.batches import Microbatch
from ..engines.engine import StepResult
from ..recipe.schema import TrainingConfig


class NonFinitePolicy:
    """Counts the steps in a row that made no update, and says when the run must stop.

    The same on every rank, because their :class:`StepResult` is.
    """

    def __init__(self, training: TrainingConfig, folder: Path):
        """``folder`` is where :meth:`write_batches` puts the batches."""
        self._training = training
        self._folder = folder
        self._skipped_in_a_row = 0

    def must_stop(self, result: StepResult) -> bool:
        """Count the step, and return whether the run must stop because of it.

        An overflow of scaled gradients is no reason: the next step has a smaller factor.
        """
        if result.updated or (result.scaled and result.scaled.overflowed):
            self._skipped_in_a_row = 0
            return False
        self._skipped_in_a_row += 1
        return not self._skips or self._skipped_in_a_row > self._training.max_skipped_steps

    def write_batches(
        self, step: int, result: StepResult, batches: list[Microbatch], rank: int
    ) -> str:
        """Write this rank's batches of the step that stops the run; return a line that says why."""
        file = self._folder / f"step-{step:08}" / f"rank-{rank}.safetensors"
        try:
            _write(file, batches)
            where = f"the batch is in {file.parent}/"
        except (OSError, SafetensorError) as error:
            where = f"the batch could not be written: {error}"

        return (
            f"step {step}: loss {result.loss} and gradient norm {result.grad_norm}; "
            f"no update was made; {where}; {self._hint()}"
        )

    @property
    def _skips(self) -> bool:
        return self._training.on_nonfinite == "skip"

    def _hint(self) -> str:
        if not self._skips:
            return "training.on_nonfinite=skip would skip the step"
        limit = self._training.max_skipped_steps
        return f"{self._skipped_in_a_row} steps in a row, training.max_skipped_steps is {limit}"


def _write(file: Path, batches: list[Microbatch]) -> None:
    """Write what the model was given, as tensors named ``microbatch.tokens`` and so on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        fields = {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "weights": batch.weights,
            "documents": batch.sequence.documents,
        }
        for name, tensor in fields.items():
            tensors[f"{number}.{name}"] = tensor.cpu().contiguous()
    save_file(tensors, file)
