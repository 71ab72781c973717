"""The training loop."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from .control import Control
from .data.batches import Batches, Microbatch
from .data.prepare import DataPaths
from .data.tokenizer import recipe_vocab_size
from .display import Display
from .engine import Engine
from .metrics import MetricsLog
from .plot import plot_loss
from .recipe import Recipe
from .run_folder import RunFolder
from .schedule import learning_rate


def build_engine(recipe: Recipe) -> Engine:
    """The recipe's model on its engine, ready to train; needs the default process group."""
    from .megatron import MegatronEngine

    return MegatronEngine(recipe, recipe_vocab_size(recipe))


def train(recipe: Recipe, paths: DataPaths, control: Control) -> None:
    """Train to the last step, evaluate, and leave the weights in the run folder. Every rank calls it."""
    engine = build_engine(recipe)
    batches = Batches(recipe, paths, recipe_vocab_size(recipe), engine.share, engine.device)
    folder, steps = RunFolder(recipe.run_dir), recipe.training.steps
    tokens, since, logged = 0, time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        display = log = None
        if dist.get_rank() == 0:
            folder.create(recipe)
            log = stack.enter_context(MetricsLog(folder, recipe))
            display = stack.enter_context(Display(steps, recipe.metrics.log_interval))
            display.say(f"{engine.num_parameters:,} parameters; {recipe.tokens_per_step:,} tokens a step; {folder.path}/")
            for line in _warnings(recipe):
                display.say(f"warning: {line}")

        for step in range(1, steps + 1):
            lr = learning_rate(step - 1, steps, recipe.optimizer.lr, recipe.lr_scheduler)
            result = engine.step(list(_agreed(control, batches.step(step - 1))), lr)
            tokens += result.tokens
            if display:
                seconds = (time.monotonic() - since) / (step - logged)
                speed = recipe.tokens_per_step / seconds
                display.step(step, result.loss, _bits_per_byte(result.loss, batches.training.bytes_per_token), speed)
            if step % recipe.metrics.log_interval == 0 or step in (1, steps):
                if log:
                    log.log(
                        step,
                        {
                            "train/loss": result.loss,
                            "train/grad_norm": result.grad_norm,
                            "train/lr": lr,
                            "train/tokens": tokens,
                            "data/padding_ratio": result.padding / recipe.tokens_per_step,
                            "perf/step_time_s": seconds,
                            "perf/tokens_per_sec_per_device": speed / dist.get_world_size(),
                            **_memory(),
                        },
                    )
                since, logged = time.monotonic(), step
            last = step == steps
            if batches.held_out and (last or (recipe.evaluation.interval and step % recipe.evaluation.interval == 0)):
                sequences = None if last else recipe.evaluation.sequences
                held_out = _agreed(control, batches.evaluation(sequences))
                evaluated = evaluate(engine, held_out, batches.held_out.corpus.bytes_per_token)
                if log:
                    log.log(step, evaluated)
                    summary = "  ".join(f"{name} {value:.4f}" for name, value in evaluated.items())
                    display.say(f"step {step}: {summary}")
                since, logged = time.monotonic(), step

        weights = engine.weights()
        if weights is not None:
            from safetensors.torch import save_file

            partial = folder.weights.with_suffix(".partial")
            save_file(weights, partial)
            partial.rename(folder.weights)
            plot_loss(folder)


def _warnings(recipe: Recipe) -> Iterator[str]:
    from .mixers import uncovered_stripes

    model = recipe.model
    for name, block in model.layers.blocks.items():
        if uncovered_stripes(block, model.kv_heads):
            yield (
                f"model.layers.blocks.{name}: {model.kv_heads} KV heads cannot cover {block.stride} stripes; what lies between "
                f"is seen in the local band alone. Use a stride of at most {model.kv_heads}, or a full layer beside it"
            )


def evaluate(engine: Engine, batches: Iterable[Microbatch], bytes_per_token: float | None) -> dict[str, float]:
    """``eval/loss`` over held-out batches, of which every rank has equally many, and ``eval/bits_per_byte`` if known."""
    results = [engine.evaluate(batch) for batch in batches]
    loss = sum(loss_sum for loss_sum, _ in results) / max(1, sum(tokens for _, tokens in results))
    bits = _bits_per_byte(loss, bytes_per_token)
    return {"eval/loss": loss} | ({} if bits is None else {"eval/bits_per_byte": bits})


def _agreed(control: Control, batches: Iterator[Microbatch]) -> Iterator[Microbatch]:
    """The batches, of which every rank has equally many; bad data on one rank stops all at the same batch."""
    while True:
        with control.together():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"memory/max_reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    import resource

    return {"memory/max_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
