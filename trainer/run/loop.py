"""The training loop: set up, step, report."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NoReturn

from ..checkpoint.run_folder import RunFolder
from ..data.batches import Batches, Microbatch
from ..data.prepare import PreparedData
from ..data.tokenizer import recipe_vocab_size
from ..engines.build import build_engine
from ..engines.engine import Engine, StepResult
from ..errors import NonFiniteError, UserError
from ..huggingface.initial import load_initial
from ..predict.flops import training_flops
from ..ranks import RankGroup
from ..recipe.schema import Recipe
from ..recipe.stages import Stage, Stages
from .checkpointer import Checkpointer, SaveOutcome
from .evaluation import agreed_batches, bits_per_byte, evaluate
from .extend import ExtendedRun, extended_run
from .nonfinite import NonFinitePolicy
from .performance import PerformanceMeter
from .report import Report, train_metrics
from .stop import StopRequest
from .watchdog import Watchdog


def train(recipe: Recipe, data: PreparedData, ranks: RankGroup) -> bool:
    """Train from the newest checkpoint, or from step 0, to the last step; every rank calls it.

    Steps count from 1 here and from 0 in recipes, data and schedules.

    Returns:
        Whether the last step was reached. False if the run was asked to stop before: its state is
        saved, and the same call resumes it.

    Raises:
        NonFiniteError: see :mod:`.nonfinite`.
        UserError: the state at the end or at a stop cannot be written.
    """
    with contextlib.ExitStack() as resources:
        trainer = _start(recipe, data, ranks, resources)
        for step in range(trainer.steps_done + 1, recipe.training.steps + 1):
            trainer.enter_stage(step)
            trainer.train_step(step)
            trainer.evaluate_if_due(step)
            if trainer.stop_or_save(step):
                return False
        trainer.finish()
        return True


def _start(
    recipe: Recipe, data: PreparedData, ranks: RankGroup, resources: contextlib.ExitStack
) -> "Trainer":
    """Build what lives as long as the run, restore the newest checkpoint and say what begins.

    ``resources`` closes it all, the last first.
    """
    vocab_size = recipe_vocab_size(recipe)
    folder = RunFolder(recipe.run_dir)
    stop = resources.enter_context(StopRequest(folder.stop_file))
    watchdog = resources.enter_context(Watchdog(recipe.launch.hang_timeout_s))
    engine = build_engine(recipe, vocab_size)
    resources.callback(engine.close)
    checkpointer = resources.enter_context(
        Checkpointer(folder.checkpoints, recipe.checkpoint.keep_latest_k, ranks)
    )

    # A run begins where its checkpoint is, else with the weights that `initial` names, else with
    # those of its seed.
    manifest = checkpointer.restore(engine, print)
    initial_lines = []
    if recipe.initial and not manifest:
        initial_lines = load_initial(engine, recipe, ranks)
    steps_done = manifest.step if manifest else 0

    extended = ExtendedRun([])
    with ranks.raise_on_all():
        if ranks.is_first:
            extended = extended_run(folder, recipe, steps_done)
            folder.begin(
                recipe,
                steps_done,
                data.fingerprints,
                data.reads_special_tokens,
                extended.extensions,
            )
    extended = ranks.broadcast(extended)
    report = resources.enter_context(Report(recipe, folder, steps_done, ranks.is_first))
    report.start(engine, initial_lines, extended.notice)
    return Trainer(
        recipe=recipe,
        vocab_size=vocab_size,
        stages=Stages(recipe, extended.extensions),
        data=data,
        ranks=ranks,
        folder=folder,
        stop=stop,
        watchdog=watchdog,
        engine=engine,
        checkpointer=checkpointer,
        nonfinite=NonFinitePolicy(recipe.training, folder.nonfinite),
        report=report,
        steps_done=steps_done,
        tokens=manifest.tokens if manifest else 0,
    )


@dataclass(frozen=True)
class ActiveStage:
    """The stage in force, with its batches and the arithmetic of its sequences."""

    stage: Stage
    batches: Batches
    flops: Callable[..., dict[str, float]]
    """``flops(length=...)``: FLOPs of a token in a training step, by part of the model."""

    @property
    def recipe(self) -> Recipe:
        return self.stage.recipe


@dataclass
class Trainer:
    """One rank's side of a run: what lives as long as the run, and what a step does with it."""

    recipe: Recipe
    """The run's recipe; that of the stage in force is ``self.active.recipe``."""
    vocab_size: int
    """Number of token ids that the model knows, before padding."""
    stages: Stages
    data: PreparedData
    ranks: RankGroup
    folder: RunFolder
    stop: StopRequest
    watchdog: Watchdog
    engine: Engine
    checkpointer: Checkpointer
    nonfinite: NonFinitePolicy
    report: Report

    steps_done: int
    """Steps that were done when the run was resumed."""
    tokens: int
    """Labels trained on since step 0; grows with every step."""
    meter: PerformanceMeter = field(default_factory=PerformanceMeter)
    active: ActiveStage = field(init=False)
    """Set by :meth:`enter_stage`."""

    def enter_stage(self, step: int) -> None:
        """Change to the stage that begins with this step, or in which a run is resumed."""
        stage = self.stages.at(step - 1)
        is_first_step = step == self.steps_done + 1
        if step - 1 != stage.start and not is_first_step:
            return

        self.active = ActiveStage(
            stage,
            Batches(
                stage.recipe,
                self.data,
                self.vocab_size,
                self.engine.batch_shard,
                self.engine.device,
                stage.data_start,
            ),
            cache(partial(training_flops, stage.recipe.model, vocab_size=self.vocab_size)),
        )
        self.engine.begin_stage(stage.recipe)
        self.report.begin_stage(
            step, stage, self.active.flops(length=stage.recipe.training.seq_length)
        )
        self.meter.restart(step - 1)  # packing a corpus takes its time, and is no part of a step

    def train_step(self, step: int) -> None:
        """Make one update, and report it."""
        active = self.active
        lr = active.stage.learning_rate(step - 1)

        self.watchdog.phase(f"the data of step {step}")
        with self.meter.waiting_for_data():
            batches = list(agreed_batches(self.ranks, active.batches.step(step - 1)))

        self.watchdog.phase(f"step {step}")
        result = self.engine.step(batches, lr)
        if self.nonfinite.must_stop(result):
            self._stop_nonfinite(step, result, batches)

        self.tokens += result.tokens
        flops_per_token = active.flops(length=active.batches.length(step - 1))
        self.meter.add_flops(active.recipe.tokens_per_step * sum(flops_per_token.values()))
        self._report_step(step, result, lr)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate at the interval on a part of the held-out data, after the last step on all."""
        batches = self.active.batches
        if not batches.held_out or not self._is_due(step, self.recipe.evaluation.interval):
            return

        sequences = None if self._is_last(step) else self.recipe.evaluation.sequences
        held_out = agreed_batches(self.ranks, batches.evaluation(sequences))
        self.watchdog.phase(f"the evaluation after step {step}")
        metrics = evaluate(self.engine, held_out, batches.held_out.bytes_per_token)
        self.report.evaluation(step, metrics)
        self.meter.restart(step)

    def stop_or_save(self, step: int) -> bool:
        """Stop here if any rank was asked to, or begin a checkpoint if it is time.

        The last step does neither: :meth:`finish` saves that.

        Returns:
            Whether the run stops; its state is saved then.
        """
        self.watchdog.phase(f"the end of step {step}")
        self._report_save(step, self.checkpointer.poll())

        # This is where a stop is decided: a signal may have reached one rank only, and all must
        # stop after the same step.
        if self.ranks.any(self.stop.is_requested()) and not self._is_last(step):
            self._save_and_wait(step)
            by_stop_file = self._remove_stop_file()
            self.report.stopped(step, by_stop_file)
            return True

        interval = self.recipe.checkpoint.interval
        if interval and step % interval == 0 and not self._is_last(step):
            self._save(step)
        return False

    def finish(self) -> None:
        """Save the state after the last step; rank 0 writes the weights and the loss curve."""
        steps = self.recipe.training.steps
        self.watchdog.phase("the last checkpoint")
        self._save_and_wait(steps)
        self._remove_stop_file()  # nothing is left to stop

        # A finished run that is started again has its weights already.
        if self.ranks.any(self.ranks.is_first and self.folder.weights_step() != steps):
            dtypes_of_ranks = self.ranks.gather(self.engine.weight_dtypes())
            with self.ranks.raise_on_all():
                if self.ranks.is_first:
                    dtypes = {name: x for dtypes in dtypes_of_ranks for name, x in dtypes.items()}
                    self.folder.write_weights(dtypes, steps)
            self.report.plot()

    def _is_last(self, step: int) -> bool:
        return step == self.recipe.training.steps

    def _is_due(self, step: int, interval: int) -> bool:
        """Return whether what is done every ``interval`` steps and after the last is due.

        An ``interval`` of 0 leaves only the last step.
        """
        return self._is_last(step) or bool(interval and step % interval == 0)

    def _report_step(self, step: int, result: StepResult, lr: float) -> None:
        """Show the step; at the interval, after the first step and after the last, record it."""
        active = self.active
        tokens_per_step = active.recipe.tokens_per_step
        step_seconds = self.meter.seconds_per_step(step)
        tokens_per_second = tokens_per_step / step_seconds

        bits = bits_per_byte(result.loss, active.batches.training.bytes_per_token)
        self.report.step(step, result, bits, tokens_per_second)
        if not result.updated:
            return
        if step == 1 or self._is_due(step, self.recipe.metrics.log_interval):
            learning = train_metrics(result, lr, self.tokens, tokens_per_step)
            performance = self.meter.metrics(step, step_seconds, tokens_per_second)
            self.report.record(step, learning | performance)
            self.meter.restart(step)

    def _save(self, step: int) -> None:
        """Begin to write the state after this step, once the save before it has ended."""
        previous = self.checkpointer.save(self.engine, step, self.tokens)
        self._report_save(step, previous)

    def _save_and_wait(self, step: int) -> None:
        """Write the state after this step.

        Raises:
            UserError: on all ranks, if it cannot be written.
        """
        self._save(step)
        outcome = self.checkpointer.poll(wait=True)
        if outcome and outcome.error:
            raise self.ranks.failure(
                f"{self.folder.checkpoints}: step {step} is not saved: {outcome.error}"
            )
        self._report_save(step, outcome)

    def _report_save(self, step: int, outcome: SaveOutcome | None) -> None:
        """Report what became of a save; None if none has ended."""
        if outcome:
            self.report.save(step, outcome, self.checkpointer.last_step)

    def _stop_nonfinite(self, step: int, result: StepResult, batches: list[Microbatch]) -> NoReturn:
        """End the run because of a step without an update; keep its batches and the state before.

        Raises:
            NonFiniteError: on all ranks.
        """
        message = self.nonfinite.write_batches(step, result, batches, self.ranks.rank)
        try:
            self._save_and_wait(step - 1)
        except UserError as unsaved:
            message += f"\n{unsaved}"
        raise self.ranks.failure(message, NonFiniteError)

    def _remove_stop_file(self) -> bool:
        """Remove the file that asks the run to stop, on rank 0; return whether it was there."""
        if not self.ranks.is_first:
            return False
        try:
            return self.folder.remove_stop_file()
        except UserError as error:
            self.report.say(f"ALERT: {error}")
            return True
