"""``longspan bench mqar``: trains recipes of the recall task, each with several learning rates and seeds, and tabulates them.

Every run is a `longspan train` and a `longspan eval mqar` of its own, in a folder of its own under ``--work``, and leaves its
result there. Killed at any time, the same command goes on: finished runs are read, begun ones go on from their checkpoints.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from ...trainer.checkpoint.run_folder import RunFolder
from ...trainer.errors import STOPPED, NonFiniteError, UserError
from ...trainer.evaluation.mqar_settings import default_settings, trained_settings
from ...trainer.progress import track
from ...trainer.recipe.file import SHIPPED, find_recipe, load_recipe, shipped_recipes
from ...trainer.recipe.schema import Recipe
from ...trainer.run.stop import PARENT_PIPE
from ..options import numbers
from .mqar_report import MQARReport

_FOLDER_FREE_SECONDS = 60.0  # runs of a command that was killed save and end within that


@dataclass(frozen=True)
class Run:
    """One training, and where it is."""

    path: Path
    """Of the recipe's file."""
    lr: float
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.run_dir)

    def __str__(self) -> str:
        return f"{self.name} lr {self.lr:g} seed {self.seed}"


class _StoppedError(Exception):
    """A run was asked to stop, and can go on."""


def bench_mqar(options: Namespace) -> int:
    """Train what is left, then write ``OUT.json``, ``OUT.png`` and the table in ``OUT.md``; the exit status."""
    for option in ("jobs", "examples"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option}: must be at least 1, got {getattr(options, option)}")
    runs = _plan(options)
    report = MQARReport(Path(options.out))
    left = [run for run in runs if _result(run, options.examples) is None]
    print(
        f"{len(runs)} runs in {options.work}/, of which {len(runs) - len(left)} are done",
        flush=True,
    )
    try:
        _run_all(left, options.jobs, options.examples)
    except _StoppedError:
        print("stopped as asked; the same command goes on from there")
        return STOPPED
    results = [_result(run, options.examples) for run in runs]
    print(report.write({run.name: run.recipe for run in runs}, results))
    return 0


def _plan(options: Namespace) -> list[Run]:
    """All the runs; every problem of every recipe is told before the first begins."""
    lrs, seeds = numbers("--lrs", options.lrs, float, 0), numbers("--seeds", options.seeds, int, 0)
    shipped = [
        path
        for path in shipped_recipes()
        if path.parent == SHIPPED / "mqar" and path.stem != "base"
    ]
    paths = list(dict.fromkeys(find_recipe(name) for name in options.recipes)) or shipped
    names = [path.stem for path in paths]
    for path in paths:
        if names.count(path.stem) > 1:
            raise UserError(
                f"RECIPE: two are called {path.stem}; a row of the table needs a name of its own"
            )
        if load_recipe(str(path)).data.mqar is None:
            raise UserError(f"{path}: is no recipe of the recall task; it has no data.mqar")
    runs = []
    for path, lr, seed in product(paths, lrs, seeds):
        overrides = [
            "launch.processes=1",
            "launch.threads=1",
            f"optimizer.lr={lr!r}",
            f"training.seed={seed}",
        ]
        overrides += [] if options.steps is None else [f"training.steps={options.steps}"]
        recipe = load_recipe(str(path), overrides)
        folder = (
            Path(options.work) / path.stem / f"lr-{lr:g}-seed-{seed}-steps-{recipe.training.steps}"
        )
        overrides.append(f"run_dir={json.dumps(str(folder))}")
        run = Run(path, lr, seed, tuple(overrides), load_recipe(str(path), overrides))
        _wait_until_free(run.folder)
        run.folder.require_usable(run.recipe)
        runs.append(run)
    return runs


def _wait_until_free(folder: RunFolder) -> None:
    deadline = time.monotonic() + _FOLDER_FREE_SECONDS
    while folder.in_use() and time.monotonic() < deadline:
        time.sleep(0.1)


def _run_all(runs: list[Run], jobs: int, examples: int) -> None:
    """So many ``jobs`` at a time; where one fails, or this is interrupted, the others save and stop."""
    lifeline, held = (
        os.pipe()
    )  # see stop.LIFELINE: this process holds the writing end, however it ends
    with ThreadPoolExecutor(jobs) as pool, track("training", len(runs), of_bytes=False) as advance:
        try:
            for work in as_completed([pool.submit(_run, run, examples, lifeline) for run in runs]):
                print(work.result(), flush=True)
                advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            os.close(held)
            pool.shutdown(wait=True)
            os.close(lifeline)


def _run(run: Run, examples: int, lifeline: int) -> str:
    """Train and evaluate, from wherever it is; a line on what was reached."""
    started = time.monotonic()
    status = _longspan(run, lifeline, "train", run.path, *run.overrides)
    if status == STOPPED:
        raise _StoppedError
    if status == NonFiniteError.exit_status:
        _write_diverged(run, examples)
    else:
        _require_success(run, status)
        _require_success(
            run, _longspan(run, lifeline, "eval", "mqar", run.folder.path, "--examples", examples)
        )
    result = _result(run, examples)
    hardest = trained_settings(run.recipe)[-1]
    rows = [
        row
        for row in result["settings"]
        if (row["length"], row["pairs"]) == (hardest.length, hardest.pairs)
    ]
    reached = (
        "diverged"
        if result["diverged"]
        else f"{rows[0]['accuracy']:.3f} at {hardest.length}/{hardest.pairs}"
    )
    return f"{run}: {reached}, after {time.monotonic() - started:.0f} s"


def _longspan(run: Run, lifeline: int, *arguments: object) -> int:
    """The status of a command that writes to the run's log, and asks itself to stop when this process ends."""
    run.folder.path.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", PARENT_PIPE: str(lifeline)}
    with _log(run).open("a") as log:
        return subprocess.run(
            [sys.executable, "-m", "longspan", *map(str, arguments)],
            env=environment,
            stdout=log,
            stderr=log,
            pass_fds=[lifeline],
            start_new_session=True,  # Ctrl-C in a terminal comes to it once, by the lifeline
            check=False,
        ).returncode


def _log(run: Run) -> Path:
    return run.folder.path / "log.txt"


def _require_success(run: Run, status: int) -> None:
    if status:
        last = _log(run).read_text().strip().splitlines()[-1:]
        raise UserError(f"{_log(run)}: {run} ended with status {status}: {''.join(last)}")


def _write_diverged(run: Run, examples: int) -> None:
    """A run whose loss became infinite or NaN has learned nothing: it counts as 0."""
    rows = [{**asdict(setting), "accuracy": 0.0} for setting in default_settings(run.recipe)]
    report = {
        "step": run.recipe.training.steps,
        "examples": examples,
        "diverged": True,
        "settings": rows,
    }
    run.folder.write_evaluation("mqar", report)


def _result(run: Run, examples: int) -> dict | None:
    """What a finished run has reached, its checkpoints and weights removed; None for one that has not finished."""
    folder = run.folder
    if not folder.evaluation("mqar").is_file():
        return None
    found = json.loads(folder.evaluation("mqar").read_text())
    asked = [(row["length"], row["pairs"]) for row in found["settings"]]
    wanted = [(setting.length, setting.pairs) for setting in default_settings(run.recipe)]
    if (
        found["step"] != run.recipe.training.steps or asked != wanted or found.get("seed", 0)
    ):  # or somebody's own questions
        return None
    if found["examples"] != examples:
        raise UserError(
            f"--examples: {examples}, but {folder.path} was asked {found['examples']}; use that or another --work"
        )
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    folder.weights.unlink(missing_ok=True)
    seconds = [
        record["perf/step_time_s"]
        for record in folder.read_metrics()
        if "perf/step_time_s" in record
    ]
    versions = [
        line.split(" ", 1) for line in folder.path.joinpath("versions.txt").read_text().splitlines()
    ]
    return {
        "recipe": run.name,
        "lr": run.lr,
        "seed": run.seed,
        "steps": found["step"],
        "examples": examples,
        "diverged": found.get("diverged", False),
        "step_seconds": statistics.median(seconds),
        "versions": {name: value for name, value in versions if name != "command"},
        "settings": found["settings"],
    }
