"""``longspan bench train``: training steps by longspan, a plain loop, and ``transformers``.

The plain loop is PyTorch's, with the same attention; ``transformers`` trains with its ``Trainer``.
Each trains in processes of its own (:mod:`longspan.launch.workers.train_steps`), in turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...trainer.progress import track
from ..options import counts, out_folder
from ..table import table
from ..workers.train_steps import CANDIDATES
from . import measure
from .plain_model import size_of


@dataclass
class TrainingTiming:
    """What was measured of one candidate."""

    candidate: str
    status: str = "measured"
    """Or why it could not run."""
    seconds: list[float] = field(default_factory=list)
    """The median step of every turn."""
    data_share: float | None = None
    """Share of a step's time that was spent on waiting for data."""


def bench_train(options: Namespace) -> None:
    """Print a table, and write ``train.json`` to the folder ``options.out``."""
    settings = {
        **asdict(size_of(options)),
        **counts(options, "length", "batch", "steps", "repeats"),
    }
    out = out_folder(options)

    timings = [TrainingTiming(name) for name in CANDIDATES]
    with track("turns", settings["repeats"] * len(timings), of_bytes=False) as advance:
        for _ in range(settings["repeats"]):
            for timing in timings:
                if timing.status == "measured":
                    _take_turn(timing, settings)
                advance(1)

    print(_table(timings, settings))
    report = {
        "machine": measure.machine(),
        "settings": settings,
        "rows": [asdict(timing) for timing in timings],
    }
    (out / "train.json").write_text(json.dumps(report, indent=1) + "\n")


def _take_turn(timing: TrainingTiming, settings: dict[str, int]) -> None:
    """Train in a process of its own, and add what it measured."""
    worker = [sys.executable, "-W", "ignore", "-m", "longspan.launch.workers.train_steps"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.NamedTemporaryFile() as file:  # not stdout, to which libraries print
        arguments = [timing.candidate, json.dumps(settings), file.name]
        done = subprocess.run(
            [*worker, *arguments], env=environment, check=False, capture_output=True, text=True
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            timing.status = f"cannot run: {errors[-1][:60] if errors else done.returncode}"
            return
        steps = json.loads(Path(file.name).read_text())
    timing.seconds.append(statistics.median(steps["seconds"]))
    timing.data_share = steps.get("data_share", timing.data_share)


def _table(timings: Sequence[TrainingTiming], settings: dict[str, int]) -> str:
    tokens = settings["length"] * settings["batch"]
    medians = {
        timing.candidate: statistics.median(timing.seconds) for timing in timings if timing.seconds
    }
    rows: list[tuple[str, ...]] = [
        ("candidate", "s a step", "tokens/s", "data", "x longspan's time")
    ]
    for timing in timings:
        if timing.candidate not in medians:
            rows.append((timing.candidate, timing.status, "", "", ""))
            continue
        seconds = medians[timing.candidate]
        ours = medians.get("longspan, s2" if "s2" in timing.candidate else "longspan, full")
        rows.append(
            (
                timing.candidate,
                f"{seconds:.3f}",
                f"{tokens / seconds:,.0f}",
                "" if timing.data_share is None else f"{timing.data_share:.1%}",
                f"{seconds / ours:.2f}" if ours else "-",
            )
        )

    return "\n".join(
        [
            f"{measure.machine()['device']}, fp32; a Llama of {settings['layers']} layers of "
            f"{settings['hidden']}, vocabulary {settings['vocabulary']:,}",
            f"{settings['batch']} sequences of {settings['length']:,} tokens a step",
            f"medians of {settings['repeats']} turns of {settings['steps']} steps; "
            "data: of a step's time, waiting for it",
            table(rows),
        ]
    )
