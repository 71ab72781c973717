"""``longspan bench train``: steps of a Llama's training by ``longspan train``, by a loop in plain PyTorch with the same
attention, and by the ``Trainer`` of ``transformers``, each in processes of its own, in turns.
"""

import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...trainer.progress import track
from ..options import counts
from ..table import table
from . import measure
from .plain_model import Size, size_of

FULL, S2 = {"mixer": "full"}, {"mixer": "s2", "block": 64, "local_blocks": 4, "stride": 8}
CANDIDATES = {
    "longspan, full": ("longspan", FULL),
    "PyTorch, full (sdpa)": ("plain", None),
    "PyTorch, full (ours)": ("plain", FULL),
    "transformers, full (sdpa)": ("transformers", None),
    "longspan, s2": ("longspan", S2),
    "PyTorch, s2 (ours)": ("plain", S2),
}
WARMUP = 3


@dataclass
class Row:
    """Of one candidate."""

    candidate: str
    status: str = "measured"
    seconds: list[float] = field(default_factory=list)
    """The median step of every turn."""
    data_share: float | None = None
    """Of the time of a step, what was spent in waiting for data."""


def bench_train(options: Namespace) -> None:
    """Print a table, and write ``train.json`` to the folder ``options.out``."""
    settings = {
        **asdict(size_of(options)),
        **counts(options, "length", "batch", "steps", "repeats"),
    }
    out = measure.out_folder(options)
    rows = [Row(name) for name in CANDIDATES]
    with track("turns", settings["repeats"] * len(rows), of_bytes=False) as advance:
        for _ in range(settings["repeats"]):
            for row in rows:
                _turn(row, settings)
                advance(1)
    print(_table(rows, settings))
    record = {
        "machine": measure.machine(),
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    (out / "train.json").write_text(json.dumps(record, indent=1) + "\n")


def _turn(row: Row, settings: dict[str, int]) -> None:
    if row.status != "measured":
        return
    code = "import sys; from longspan.launch.bench.train import write_seconds; write_seconds(*sys.argv[1:])"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.NamedTemporaryFile() as file:  # libraries print
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            code,
            row.candidate,
            json.dumps(settings),
            file.name,
        ]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            row.status = f"cannot run: {lines[-1][:60] if lines else done.returncode}"
            return
        found = json.loads(Path(file.name).read_text())
    row.seconds.append(statistics.median(found["seconds"]))
    row.data_share = found.get("data_share", row.data_share)


def write_seconds(candidate: str, settings: str, file: str) -> None:
    """The process of a turn: what every step took, after a few others."""
    kind, block = CANDIDATES[candidate]
    given = json.loads(settings)
    length, batch, steps = (given.pop(name) for name in ("length", "batch", "steps"))
    given.pop("repeats")
    size = Size(**given)
    run = {"longspan": _longspan, "plain": _plain, "transformers": _transformers}[kind]
    Path(file).write_text(json.dumps(run(size, block, length, batch, steps + WARMUP)))


def _longspan(size, block: dict, length: int, batch: int, steps: int) -> dict:
    import yaml

    from ...trainer.data.build import build_corpus
    from ...trainer.data.tokenizer import ByteTokenizer
    from ..commands.train import train

    with tempfile.TemporaryDirectory() as folder:
        metrics = {"log_interval": 1}
        recipe = size.recipe(length, batch, block, metrics=metrics, checkpoint={"interval": 0})
        recipe["run_dir"] = f"{folder}/run"
        # One document, as the others have it: several in a sequence are less work, and other work.
        text = Path(folder, "text")
        text.write_text(
            "".join(random.Random(0).choices(string.ascii_letters, k=length * batch * (steps + 1)))
        )
        build_corpus([text], ByteTokenizer(), f"{folder}/corpus")
        recipe["data"] = {"sources": {f"{folder}/corpus": 1.0}}
        recipe["training"]["steps"] = steps
        file = Path(folder, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe))
        assert train(str(file), [], dry_run=False) == 0
        records = [
            json.loads(line)
            for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        ]
    records = [
        record
        for record in records
        if record.get("step", 0) > WARMUP and "perf/step_time_s" in record
    ]
    seconds = [record["perf/step_time_s"] for record in records]
    waited = [record["perf/data_time_s"] for record in records]
    return {"seconds": seconds, "data_share": sum(waited) / sum(seconds)}


def _plain(size, block: dict | None, length: int, batch: int, steps: int) -> dict:
    import torch

    from ...attention import attend
    from ...trainer.recipe.schema import LayersConfig
    from ..process import keep_freed_memory
    from .plain_model import PlainLlama, dense, random_batches

    keep_freed_memory()  # as longspan train does
    attention: Callable = dense
    if block is not None:
        pattern = (
            LayersConfig(blocks={"all": block}, pattern=["all"])
            .blocks["all"]
            .attention_pattern(size.kv_heads)
        )
        attention = lambda q, k, v: attend(q, k, v, pattern)  # noqa: E731
    model = PlainLlama(size, attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    seconds, batches = [], random_batches(size, length, batch)
    for _ in range(steps):
        began = time.perf_counter()
        tokens = next(batches)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[WARMUP:]}


def _transformers(size, block: None, length: int, batch: int, steps: int) -> dict:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ..process import keep_freed_memory
    from .plain_model import random_batches, transformers_llama

    keep_freed_memory()
    samples = next(random_batches(size, length, batch * steps))
    data = [{"input_ids": row[:-1], "labels": row[:-1]} for row in samples]  # Trainer shifts them
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **options):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        torch.manual_seed(0)
        Trainer(
            transformers_llama(size, length), arguments, train_dataset=data, callbacks=[Clock()]
        ).train()
    return {
        "seconds": [
            after - before for before, after in zip(ends[WARMUP - 1 :], ends[WARMUP:], strict=False)
        ]
    }


def _table(rows: list[Row], settings: dict[str, int]) -> str:
    tokens = settings["length"] * settings["batch"]
    medians = {row.candidate: statistics.median(row.seconds) for row in rows if row.seconds}
    lines = [("candidate", "s a step", "tokens/s", "data", "x longspan's time")]
    for row in rows:
        if row.candidate not in medians:
            lines.append((row.candidate, row.status, "", "", ""))
            continue
        ours = medians.get(f"longspan, {'s2' if 's2' in row.candidate else 'full'}")
        seconds = medians[row.candidate]
        share = "" if row.data_share is None else f"{row.data_share:.1%}"
        ratio = f"{seconds / ours:.2f}" if ours else "-"
        lines.append((row.candidate, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", share, ratio))
    shape = f"{settings['layers']} layers of {settings['hidden']}, vocabulary {settings['vocabulary']:,}"
    return "\n".join(
        [
            f"{measure.machine()['device']}, fp32; a Llama of {shape}",
            f"{settings['batch']} sequences of {settings['length']:,} tokens a step",
            f"medians of {settings['repeats']} turns of {settings['steps']} steps; data: of a step's time, waiting for it",
            table(lines),
        ]
    )
