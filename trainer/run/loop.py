"""The training loop."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from functools import cache, partial

import torch
import torch.distributed as dist

from ..checkpoint.run_folder import RunFolder
from ..data.batches import Batches, Microbatch
from ..data.prepare import PreparedData
from ..data.tokenizer import recipe_vocab_size
from ..engines.build import build_engine
from ..engines.engine import Engine
from ..errors import NonFiniteError, UserError
from ..huggingface.initial import load_initial
from ..predict.communication import choices
from ..predict.estimate import DEVICES
from ..predict.flops import training_flops
from ..ranks import RankGroup
from ..recipe.schema import Recipe
from .checkpointer import Checkpointer, Saved
from .display import Display
from .metrics import MetricsLog
from .nonfinite import NonFinitePolicy
from .plot import plot_loss
from .stop import StopRequest
from .watchdog import Watchdog


def train(recipe: Recipe, data: PreparedData, ranks: RankGroup) -> bool:
    """Train from the newest checkpoint, or from step 0, to the last step; every rank calls it.

    Returns:
        False where it was asked to stop before the end: the state is saved, and the same call goes on with it.

    Raises:
        NonFiniteError: see :mod:`.nonfinite`.
        UserError: where the state at the end or at a stop cannot be written.
    """
    folder, steps, rank = RunFolder(recipe.run_dir), recipe.training.steps, dist.get_rank()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest(folder.stop_file))
        watchdog = stack.enter_context(Watchdog(recipe.launch.hang_timeout_s))
        engine = build_engine(recipe)
        stack.callback(engine.close)
        checkpointer = stack.enter_context(
            Checkpointer(folder.checkpoints, recipe.checkpoint.keep_latest_k, ranks)
        )
        restored = checkpointer.restore(engine, print)
        done, tokens = (restored.step, restored.tokens) if restored else (0, 0)
        begun = load_initial(engine, recipe, ranks) if recipe.initial and not restored else []
        policy = NonFinitePolicy(recipe.training, folder.nonfinite)
        display = log = None
        if rank == 0:
            folder.begin(recipe, done, data.fingerprints)
            log = stack.enter_context(MetricsLog(folder, recipe))
            display = stack.enter_context(Display(steps, recipe.metrics.log_interval, done))
            display.say(
                f"{engine.num_parameters:,} parameters; {recipe.tokens_per_step:,} tokens a step; {folder.path}/"
            )
            for line in begun:
                display.say(line)
            if done:
                display.say(
                    f"going on from step {done}"
                    if done < steps
                    else f"all {steps} steps are done; raise training.steps"
                )
            for choice in choices(recipe, engine.dtype.itemsize) if recipe.parallel.cp > 1 else ():
                display.say(str(choice))
            for line in _warnings(recipe):
                display.say(f"warning: {line}")

        def report(step: int, saved: Saved | None) -> None:
            if saved and display:
                if saved.error:
                    kept = (
                        f"step {checkpointer.last_step} is the last"
                        if checkpointer.last_step
                        else "there is none yet"
                    )
                    display.say(
                        f"ALERT: the checkpoint of step {saved.step} could not be written: {saved.error}; {kept}"
                    )
                else:
                    log.log(step, {"checkpoint/save_s": saved.seconds})
                    if saved.warning:
                        display.say(f"ALERT: {saved.warning}")

        def save_and_wait(step: int) -> None:
            report(step, checkpointer.save(engine, step, tokens))
            saved = checkpointer.poll(wait=True)
            if saved and saved.error:
                raise ranks.failure(
                    f"{folder.checkpoints}: step {step} is not saved: {saved.error}"
                )
            report(step, saved)

        now, batches, pace = recipe, None, _Pace(done)
        for step in range(done + 1, steps + 1):
            lr = recipe.learning_rate(step - 1)
            if batches is None or step - 1 in recipe.stage_starts:
                now, first = recipe.at(step - 1), recipe.data_start(step - 1)
                batches = Batches(
                    now, data, recipe_vocab_size(recipe), engine.share, engine.device, first
                )
                engine.begin_stage(now)
                flops = cache(
                    partial(training_flops, now.model, vocab_size=recipe_vocab_size(recipe))
                )
                if log and step - 1 in recipe.stage_starts:
                    log.log(
                        step,
                        {
                            f"flops/{name}": part
                            for name, part in flops(length=now.training.seq_length).items()
                        },
                    )
                if display and now != recipe:
                    display.say(f"step {step}: {_stage(now)}")
                pace = _Pace(step - 1)  # packing takes its time
            watchdog.phase(f"the data of step {step}")
            began = time.monotonic()
            taken = list(_agreed(ranks, batches.step(step - 1)))
            pace.waited += time.monotonic() - began
            watchdog.phase(f"step {step}")
            result = engine.step(taken, lr)
            if policy.must_stop(result):
                message = policy.write_batches(step, result, taken, rank)
                try:
                    save_and_wait(step - 1)
                except UserError as unsaved:
                    message += f"\n{unsaved}"
                raise ranks.failure(message, NonFiniteError)
            tokens += result.tokens
            last = step == steps
            pace.flops += now.tokens_per_step * sum(flops(length=batches.length(step - 1)).values())
            if display:
                seconds = pace.step_seconds(step)
                speed = now.tokens_per_step / seconds
                display.step(
                    step,
                    result.loss,
                    _bits_per_byte(result.loss, batches.training.bytes_per_token),
                    speed,
                )
                if not result.updated:
                    what = f"loss {result.loss}, gradient norm {result.grad_norm}"
                    display.say(f"step {step}: {what}: skipped, without an update")
                    log.log(step, {"train/skipped": 1})
            if result.updated and (step % recipe.metrics.log_interval == 0 or step == 1 or last):
                if log:
                    log.log(
                        step,
                        {
                            "train/loss": result.loss,
                            "train/grad_norm": result.grad_norm,
                            "train/lr": lr,
                            "train/tokens": tokens,
                            **(
                                {}
                                if result.balance_loss is None
                                else {"train/balance_loss": result.balance_loss}
                            ),
                            "data/padding_ratio": result.padding / now.tokens_per_step,
                            "perf/step_time_s": seconds,
                            "perf/data_time_s": pace.waited / (step - pace.step),
                            "perf/tokens_per_sec_per_device": speed / dist.get_world_size(),
                            **_arithmetic(
                                pace.flops / (step - pace.step) / seconds / dist.get_world_size()
                            ),
                            **_memory(),
                        },
                    )
                pace = _Pace(step)
            if batches.held_out and (
                last or (recipe.evaluation.interval and step % recipe.evaluation.interval == 0)
            ):
                sequences = None if last else recipe.evaluation.sequences
                held_out = _agreed(ranks, batches.evaluation(sequences))
                watchdog.phase(f"the evaluation after step {step}")
                evaluated = evaluate(engine, held_out, batches.held_out.bytes_per_token)
                if log:
                    log.log(step, evaluated)
                    summary = "  ".join(f"{name} {value:.4f}" for name, value in evaluated.items())
                    display.say(f"step {step}: {summary}")
                pace = _Pace(step)
            watchdog.phase(f"the end of step {step}")
            report(step, checkpointer.poll())
            if ranks.any(stop.asked()) and not last:
                save_and_wait(step)
                if display:
                    by = f" by {folder.stop_file}, now removed" if folder.stop_file.exists() else ""
                    folder.stop_file.unlink(missing_ok=True)
                    display.say(
                        f"stopped after step {step} of {steps}, as asked{by}; the same command goes on from there"
                    )
                return False
            if recipe.checkpoint.interval and step % recipe.checkpoint.interval == 0 and not last:
                report(step, checkpointer.save(engine, step, tokens))

        watchdog.phase("the last checkpoint")
        save_and_wait(steps)
        if display:
            folder.stop_file.unlink(missing_ok=True)  # nothing is left to stop
        if ranks.any(rank == 0 and folder.weights_step() != steps):
            weights = engine.weights()
            with ranks.raise_on_all():
                if rank == 0:
                    folder.write_weights(weights, steps)
                    plot_loss(folder)
        return True


def _stage(recipe: Recipe) -> str:
    training, rotary = recipe.training, recipe.model.rope_theta
    return (
        f"a stage of {training.global_batch_size} sequences of {training.seq_length:,} tokens a step, rope_theta {rotary:g}, "
        f"lr {recipe.optimizer.lr:g}"
    )


def _warnings(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    for name, block in model.layers.blocks.items():
        if block.leaves_gaps(model.kv_heads):
            yield (
                f"model.layers.blocks.{name}: the stripes of {model.kv_heads} KV heads leave gaps, which are seen from nearby "
                f"alone. Use a stride of at most {model.kv_heads}, or a full layer beside it"
            )


def evaluate(
    engine: Engine, batches: Iterable[Microbatch], bytes_per_token: float | None
) -> dict[str, float]:
    """``eval/loss`` over held-out batches, of which every rank has equally many, and ``eval/bits_per_byte`` if known."""
    results = [engine.evaluate(batch) for batch in batches]
    loss = sum(loss_sum for loss_sum, _ in results) / max(1, sum(tokens for _, tokens in results))
    bits = _bits_per_byte(loss, bytes_per_token)
    return {"eval/loss": loss} | ({} if bits is None else {"eval/bits_per_byte": bits})


def _agreed(ranks: RankGroup, batches: Iterator[Microbatch]) -> Iterator[Microbatch]:
    """The batches, of which every rank has equally many; bad data on one rank stops all at the same batch."""
    while True:
        with ranks.raise_on_all():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


class _Pace:
    """How long steps take, from after a ``step`` on."""

    def __init__(self, step: int):
        self.began, self.step = time.monotonic(), step
        self.waited = 0.0
        """Seconds, for data."""
        self.flops = 0.0
        """Of all ranks."""

    def step_seconds(self, step: int) -> float:
        return (time.monotonic() - self.began) / (step - self.step)


def _arithmetic(flops: float) -> dict[str, float]:
    """Of each device a second, and on GPUs of a known peak the share of it (MFU)."""
    found = {"perf/tflops_per_device": flops / 1e12}
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    for device in DEVICES.values():
        if device.name in name:
            found["perf/mfu"] = found["perf/tflops_per_device"] / device.tflops
    return found


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"memory/max_reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    import resource

    return {"memory/max_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
