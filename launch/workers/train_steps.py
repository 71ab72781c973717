"""A process that trains a Llama for some steps, and writes what every step took to a file.

One turn of a candidate of ``longspan bench train``; see :mod:`longspan.launch.bench.train`.
"""

import argparse
import json
import random
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..bench.plain_model import LlamaSize

WARMUP_STEPS = 3
"""Steps before those that are measured."""

FULL = {"mixer": "full"}
S2 = {"mixer": "s2", "block": 64, "local_blocks": 4, "stride": 8}


class Turn(NamedTuple):
    """What a candidate trains."""

    size: LlamaSize
    block: dict | None
    """The kind of all layers, as a recipe has it; None for torch's SDPA."""
    length: int
    """Tokens of a sequence."""
    batch: int
    """Sequences of a step."""
    steps: int
    """Steps that are measured."""

    @property
    def all_steps(self) -> int:
        return WARMUP_STEPS + self.steps


class TrainedSteps(NamedTuple):
    """What was measured of a turn."""

    seconds: list[float]
    """Of every step."""
    data_share: float | None = None
    """Share of the time that was spent on waiting for data, if known."""


def _train_longspan(turn: Turn) -> TrainedSteps:
    import yaml

    from ...trainer.data.build import build_corpus
    from ...trainer.data.tokenizer import ByteTokenizer
    from ..training import train

    assert turn.block is not None
    with tempfile.TemporaryDirectory() as folder:
        # One document, as the others have it: several in a sequence are less work, and other work.
        text = Path(folder, "text")
        letters = turn.length * turn.batch * (turn.all_steps + 1)
        text.write_text("".join(random.Random(0).choices(string.ascii_letters, k=letters)))
        build_corpus([text], ByteTokenizer(), f"{folder}/corpus")

        recipe = turn.size.recipe(
            turn.length,
            turn.batch,
            turn.block,
            metrics={"log_interval": 1},
            checkpoint={"interval": 0},
        )
        recipe["run_dir"] = f"{folder}/run"
        recipe["data"] = {"sources": {f"{folder}/corpus": 1.0}}
        recipe["training"]["steps"] = turn.all_steps
        file = Path(folder, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe))
        status = train(str(file), [], dry_run=False)
        assert status == 0, status

        metrics = Path(folder, "run", "metrics.jsonl").read_text()
    records = [json.loads(line) for line in metrics.splitlines()]
    timed = [
        record
        for record in records
        if record.get("step", 0) > WARMUP_STEPS and "perf/step_time_s" in record
    ]
    seconds = [record["perf/step_time_s"] for record in timed]
    waited = [record["perf/data_time_s"] for record in timed]
    return TrainedSteps(seconds, data_share=sum(waited) / sum(seconds))


def _train_plain(turn: Turn) -> TrainedSteps:
    import torch

    from ..bench.plain_model import PlainLlama, dense_attention, random_batches
    from ..process import keep_freed_memory

    keep_freed_memory()  # as longspan train does
    attention = dense_attention
    if turn.block is not None:
        attention = _longspan_attention(turn.block, turn.size.kv_heads)
    model = PlainLlama(turn.size, attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batches = random_batches(turn.size, turn.length, turn.batch)

    seconds = []
    for _ in range(turn.all_steps):
        began = time.perf_counter()
        tokens = next(batches)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return TrainedSteps(seconds[WARMUP_STEPS:])


def _longspan_attention(block: dict, kv_heads: int):
    """Return the attention of a kind of layer, on ``[batch, time, heads, dim]``."""
    from ...attention import attend
    from ...trainer.recipe.schema import LayersConfig

    layers = LayersConfig.model_validate({"blocks": {"all": block}, "pattern": ["all"]})
    pattern = layers.blocks["all"].attention_pattern(kv_heads)
    assert pattern is not None, f"{block} has no attention"
    return lambda q, k, v: attend(q, k, v, pattern)


def _train_transformers(turn: Turn) -> TrainedSteps:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ..bench.plain_model import random_batches, transformers_llama
    from ..process import keep_freed_memory

    class Clock(TrainerCallback):
        def __init__(self):
            self.step_ends: list[float] = []

        def on_step_end(self, *arguments, **options):
            self.step_ends.append(time.perf_counter())

    keep_freed_memory()
    samples = next(random_batches(turn.size, turn.length, turn.batch * turn.all_steps))
    # The Trainer shifts the labels.
    data = [{"input_ids": sample[:-1], "labels": sample[:-1]} for sample in samples]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=turn.batch,
            max_steps=turn.all_steps,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        torch.manual_seed(0)
        model = transformers_llama(turn.size, turn.length)
        Trainer(model, arguments, train_dataset=data, callbacks=[clock]).train()

    ends = clock.step_ends[WARMUP_STEPS - 1 :]
    return TrainedSteps([end - begin for begin, end in pairwise(ends)])


class TrainingCandidate(NamedTuple):
    """A trainer, and the kind of its layers."""

    train: Callable[[Turn], TrainedSteps]
    block: dict | None


CANDIDATES = {
    "longspan, full": TrainingCandidate(_train_longspan, FULL),
    "PyTorch, full (sdpa)": TrainingCandidate(_train_plain, None),
    "PyTorch, full (ours)": TrainingCandidate(_train_plain, FULL),
    "transformers, full (sdpa)": TrainingCandidate(_train_transformers, None),
    "longspan, s2": TrainingCandidate(_train_longspan, S2),
    "PyTorch, s2 (ours)": TrainingCandidate(_train_plain, S2),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("candidate", choices=CANDIDATES)
    parser.add_argument("settings", type=json.loads, help="JSON of the command's options")
    parser.add_argument("out", type=Path, help="file to write what every step took to, as JSON")
    options = parser.parse_args()

    settings = options.settings
    size = LlamaSize(**{field.name: settings[field.name] for field in fields(LlamaSize)})
    candidate = CANDIDATES[options.candidate]
    turn = Turn(size, candidate.block, settings["length"], settings["batch"], settings["steps"])
    steps = candidate.train(turn)

    record: dict[str, object] = {"seconds": steps.seconds}
    if steps.data_share is not None:
        record["data_share"] = steps.data_share
    options.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
