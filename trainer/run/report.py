"""What rank 0 says about a run: lines and a bar for people, records for ``metrics.jsonl``."""

import contextlib
from collections.abc import Iterator

from ..checkpoint.run_folder import RunFolder
from ..engines.engine import Engine, StepResult
from ..errors import UserError
from ..predict.backends import backend_lines
from ..predict.communication import choices
from ..recipe.schema import Recipe
from ..recipe.stages import Stage
from .checkpointer import SaveOutcome
from .display import Display
from .metrics import MetricsLog
from .plot import plot_loss


class Report:
    """What every rank reports about a run; only the first is heard.

    A context manager. Every rank has one and makes the same calls, so that the loop need not ask
    which rank it is on. The order of the calls is the order of the lines and of the records.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, steps_done: int, is_first: bool):
        self._recipe = recipe
        self._folder = folder
        self._steps = recipe.training.steps
        self._steps_done = steps_done
        self._is_first = is_first
        self._log: MetricsLog | None = None
        self._display: Display | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> "Report":
        if not self._is_first:
            return self
        log_interval = self._recipe.metrics.log_interval
        with contextlib.ExitStack() as resources:
            self._log = resources.enter_context(
                MetricsLog(self._folder, self._recipe, self._steps_done)
            )
            self._display = resources.enter_context(
                Display(self._steps, log_interval, self._steps_done)
            )
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._resources.__exit__(*error)

    def say(self, line: str) -> None:
        """Show a line that stays."""
        if self._display:
            self._display.say(line)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write one record of ``metrics.jsonl``."""
        if self._log:
            self._log.log(step, metrics)

    def start(self, engine: Engine, initial_lines: list[str], extension: str | None) -> None:
        """Say what is about to be trained, and warn of what looks like a mistake.

        Args:
            initial_lines: about the weights that the run begins with, if they come from elsewhere.
            extension: about a learning rate that was planned otherwise before, if there is one.
        """
        if not self._is_first:  # choices() computes a plan for every schedule
            return
        tokens_per_step = self._recipe.tokens_per_step
        self.say(
            f"{engine.num_parameters:,} parameters; {tokens_per_step:,} tokens a step; "
            f"{self._folder.path}/"
        )
        for line in initial_lines:
            self.say(line)
        if self._steps_done >= self._steps:
            self.say(f"all {self._steps} steps are done; raise training.steps")
        elif self._steps_done:
            self.say(f"resuming from step {self._steps_done}")
        if extension:
            self.say(extension)
        if self._recipe.parallel.cp > 1:
            for choice in choices(self._recipe, engine.dtype.itemsize):
                self.say(str(choice))
        if engine.capability is not None:
            for line in backend_lines(self._recipe, engine.capability):
                self.say(line)
        for warning in recipe_warnings(self._recipe):
            self.say(f"warning: {warning}")

    def begin_stage(self, step: int, stage: Stage, flops: dict[str, float]) -> None:
        """Say what this stage changes, and record the FLOPs of a token if it begins with this step.

        A run that is resumed in the middle of a stage has that record already.
        """
        if step - 1 == stage.start:
            self.record(step, {f"flops/{name}": value for name, value in flops.items()})
        if stage.recipe != self._recipe:
            self.say(f"step {step}: {_describe(stage.recipe)}")

    def step(
        self, step: int, result: StepResult, bits_per_byte: float | None, tokens_per_second: float
    ) -> None:
        """Show a step that has ended, and record it if it made no update."""
        if self._display:
            self._display.step(step, result.loss, bits_per_byte, tokens_per_second)
        if not result.updated:
            what = f"loss {result.loss}, gradient norm {result.grad_norm}"
            if result.scaled and result.scaled.overflowed:
                what = f"gradients overflow float16; the loss is scaled by {result.scaled.scale:,g}"
            self.say(f"step {step}: {what}: skipped, without an update")
            self.record(step, {"train/skipped": 1})

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record and show an evaluation after a step."""
        self.record(step, metrics)
        summary = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}: {summary}")

    def save(self, step: int, outcome: SaveOutcome, last_step: int) -> None:
        """Report at step ``step`` that a save, begun at an earlier one, has ended.

        ``last_step`` is that of the newest whole checkpoint, 0 if there is none.
        """
        if outcome.error:
            kept = f"step {last_step} is the last" if last_step else "there is none yet"
            self.say(
                f"ALERT: the checkpoint of step {outcome.step} could not be written: "
                f"{outcome.error}; {kept}"
            )
            return
        self.record(step, {"checkpoint/save_s": outcome.seconds})
        if outcome.warning:
            self.say(f"ALERT: {outcome.warning}")

    def plot(self) -> None:
        """Draw the loss curve; a picture that cannot be drawn stops nothing."""
        if not self._is_first:
            return
        try:
            plot_loss(self._folder)
        except UserError as error:
            self.say(f"ALERT: {error}; `longspan plot {self._folder.path}` draws it later")

    def stopped(self, step: int, by_stop_file: bool) -> None:
        """Say that the run stops after a step because it was asked to."""
        by = f" by {self._folder.stop_file}, now removed" if by_stop_file else ""
        self.say(
            f"stopped after step {step} of {self._steps}, as asked{by}; "
            "the same command resumes from there"
        )


def train_metrics(
    result: StepResult, lr: float, tokens: int, tokens_per_step: int
) -> dict[str, float]:
    """Return what a record says about learning and data.

    Args:
        tokens: labels trained on since step 0.
        tokens_per_step: of all ranks, with padding.
    """
    metrics = {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/lr": lr,
        "train/tokens": tokens,
    }
    if result.balance_loss is not None:
        metrics["train/balance_loss"] = result.balance_loss
    if result.scaled is not None:
        metrics["train/loss_scale"] = result.scaled.scale
        metrics["train/overflows"] = result.scaled.overflows
    metrics["data/padding_ratio"] = result.padding / tokens_per_step
    return metrics


def recipe_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield what is allowed in a recipe and yet looks like a mistake, with key and fix."""
    model = recipe.model
    for name, block in model.layers.blocks.items():
        if block.leaves_gaps(model.kv_heads):
            yield (
                f"model.layers.blocks.{name}: the stripes of {model.kv_heads} KV heads leave gaps "
                f"that only nearby queries see. Use a stride of at most {model.kv_heads}, "
                "or a full layer beside it"
            )


def _describe(recipe: Recipe) -> str:
    """Return a line about the recipe of a stage: what a stage may change."""
    training = recipe.training
    return (
        f"a stage of {training.global_batch_size} sequences of {training.seq_length:,} tokens "
        f"a step, rope_theta {recipe.model.rope_theta:g}, lr {recipe.optimizer.lr:g}"
    )
