"""``longspan bench mqar``: recall of the mixers, over several learning rates and seeds.

Every training is a ``longspan train`` and a ``longspan eval mqar`` of its own, in a folder of its
own under ``--work``, and leaves its result there. Killed at any time, the same command continues:
finished ones are read, others resume from their checkpoints.
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
from ...trainer.paths import escape_path
from ...trainer.progress import track
from ...trainer.recipe.file import SHIPPED, find_recipe, load_recipe, shipped_recipes
from ...trainer.recipe.schema import Recipe
from ...trainer.run.stop import PARENT_PIPE
from ..options import numbers
from .mqar_report import MQARReport

_FOLDER_FREE_SECONDS = 60.0  # trainings of a command that was killed save and end within this time


@dataclass(frozen=True)
class Trial:
    """One training, and where it is."""

    path: Path
    """The file of its recipe."""
    lr: float
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe
    """Resolved, with the overrides."""

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.run_dir)

    @property
    def log(self) -> Path:
        """What its commands print."""
        return self.folder.path / "log.txt"

    def __str__(self) -> str:
        return f"{self.name} lr {self.lr:g} seed {self.seed}"


class _StoppedError(Exception):
    """A training was asked to stop, and can be resumed."""


def bench_mqar(options: Namespace) -> int:
    """Train what is left, then write ``OUT.json``, ``OUT.png`` and the table in ``OUT.md``.

    Returns:
        The exit status.
    """
    for option in ("jobs", "examples"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option}: must be at least 1, got {getattr(options, option)}")

    trials = _trials(options)
    report = MQARReport(Path(options.out))
    left = [trial for trial in trials if _result(trial, options.examples) is None]
    num_done = len(trials) - len(left)
    print(f"{len(trials)} runs in {options.work}/, of which {num_done} are done", flush=True)
    try:
        _run_all(left, options.jobs, options.examples)
    except _StoppedError:
        print("stopped as asked; the same command continues from there")
        return STOPPED

    results = [_finished_result(trial, options.examples) for trial in trials]
    print(report.write({trial.name: trial.recipe for trial in trials}, results))
    return 0


def _trials(options: Namespace) -> list[Trial]:
    """Return all the trainings.

    Raises:
        UserError: if anything is wrong with a recipe, before the first training begins.
    """
    lrs = numbers("--lrs", options.lrs, float, 0)
    seeds = numbers("--seeds", options.seeds, int, 0)
    trials = []
    for path, lr, seed in product(_recipe_files(options.recipes), lrs, seeds):
        overrides = [
            "launch.processes=1",
            "launch.threads=1",
            f"optimizer.lr={lr!r}",
            f"training.seed={seed}",
        ]
        if options.steps is not None:
            overrides.append(f"training.steps={options.steps}")
        steps = load_recipe(str(path), overrides).training.steps
        folder = Path(options.work) / path.stem / f"lr-{lr:g}-seed-{seed}-steps-{steps}"
        overrides.append(f"run_dir={json.dumps(escape_path(str(folder)))}")

        trial = Trial(path, lr, seed, tuple(overrides), load_recipe(str(path), overrides))
        _wait_until_free(trial.folder)
        trial.folder.require_usable(trial.recipe)
        trials.append(trial)
    return trials


def _recipe_files(names: list[str]) -> list[Path]:
    """Return the files of these recipes of the recall task, by default of all that are shipped."""
    paths = list(dict.fromkeys(find_recipe(name) for name in names))
    if not paths:
        folder = SHIPPED / "mqar"
        paths = [
            path for path in shipped_recipes() if path.parent == folder and path.stem != "base"
        ]

    stems = [path.stem for path in paths]
    for path in paths:
        if stems.count(path.stem) > 1:
            raise UserError(
                f"RECIPE: two are called {path.stem}; each row of the table needs its own name"
            )
        if load_recipe(str(path)).data.mqar is None:
            raise UserError(f"{path}: is not a recipe of the recall task; it has no data.mqar")
    return paths


def _wait_until_free(folder: RunFolder) -> None:
    deadline = time.monotonic() + _FOLDER_FREE_SECONDS
    while folder.in_use() and time.monotonic() < deadline:
        time.sleep(0.1)


def _run_all(trials: list[Trial], jobs: int, examples: int) -> None:
    """Run the trainings, ``jobs`` at a time.

    If one fails, or this process is interrupted, the others save and stop.
    """
    # See PARENT_PIPE: this process holds the writing end, and however it ends, the trainings see
    # the pipe's end.
    pipe_reading, pipe_writing = os.pipe()
    with (
        ThreadPoolExecutor(jobs) as pool,
        track("training", len(trials), of_bytes=False) as advance,
    ):
        try:
            futures = [pool.submit(_run, trial, examples, pipe_reading) for trial in trials]
            for future in as_completed(futures):
                print(future.result(), flush=True)
                advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            os.close(pipe_writing)
            pool.shutdown(wait=True)
            os.close(pipe_reading)


def _run(trial: Trial, examples: int, parent_pipe: int) -> str:
    """Train and evaluate, from wherever it is, and return a line about what was reached."""
    started = time.monotonic()
    status = _longspan(trial, parent_pipe, "train", trial.path, *trial.overrides)
    if status == STOPPED:
        raise _StoppedError
    if status == NonFiniteError.exit_status:
        _write_diverged(trial, examples)
    else:
        _require_success(trial, status)
        evaluation = ("eval", "mqar", trial.folder.path, "--examples", examples)
        _require_success(trial, _longspan(trial, parent_pipe, *evaluation))

    result = _finished_result(trial, examples)
    seconds = time.monotonic() - started
    return f"{trial}: {_reached(trial, result)}, after {seconds:.0f} s"


def _reached(trial: Trial, result: dict) -> str:
    """Return the accuracy in the hardest setting that was trained."""
    if result["diverged"]:
        return "diverged"
    hardest = trained_settings(trial.recipe)[-1]
    accuracy = next(
        setting["accuracy"]
        for setting in result["settings"]
        if (setting["length"], setting["pairs"]) == (hardest.length, hardest.pairs)
    )
    return f"{accuracy:.3f} at {hardest.length}/{hardest.pairs}"


def _longspan(trial: Trial, parent_pipe: int, *arguments: object) -> int:
    """Run a command that writes to the training's log, and return its exit status.

    It stops when this process ends.
    """
    trial.folder.path.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", PARENT_PIPE: str(parent_pipe)}
    with trial.log.open("a") as log:
        return subprocess.run(
            [sys.executable, "-m", "longspan", *map(str, arguments)],
            env=environment,
            stdout=log,
            stderr=log,
            pass_fds=[parent_pipe],
            start_new_session=True,  # Ctrl-C in a terminal comes to it once, by the pipe
            check=False,
        ).returncode


def _require_success(trial: Trial, status: int) -> None:
    if status:
        last_line = trial.log.read_text().strip().splitlines()[-1:]
        raise UserError(f"{trial.log}: {trial} ended with status {status}: {''.join(last_line)}")


def _write_diverged(trial: Trial, examples: int) -> None:
    """Report a training whose loss became infinite or NaN: it has learned nothing, a 0."""
    settings = [{**asdict(setting), "accuracy": 0.0} for setting in default_settings(trial.recipe)]
    report = {
        "step": trial.recipe.training.steps,
        "examples": examples,
        "diverged": True,
        "settings": settings,
    }
    trial.folder.write_evaluation("mqar", report)


def _finished_result(trial: Trial, examples: int) -> dict:
    result = _result(trial, examples)
    assert result is not None, f"{trial} has no result"
    return result


def _result(trial: Trial, examples: int) -> dict | None:
    """Return what a finished training has reached, or None for one that has not finished.

    Removes its checkpoints and weights.
    """
    folder = trial.folder
    if not folder.evaluation("mqar").is_file():
        return None
    report = json.loads(folder.evaluation("mqar").read_text())
    if not _answers_our_questions(report, trial):
        return None
    if report["examples"] != examples:
        raise UserError(
            f"--examples: {examples}, but {folder.path} was asked {report['examples']}; "
            "use that or another --work"
        )

    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    folder.weights.unlink(missing_ok=True)
    step_seconds = [
        record["perf/step_time_s"]
        for record in folder.read_metrics()
        if "perf/step_time_s" in record
    ]
    return {
        "recipe": trial.name,
        "lr": trial.lr,
        "seed": trial.seed,
        "steps": report["step"],
        "examples": examples,
        "diverged": report.get("diverged", False),
        "step_seconds": statistics.median(step_seconds),
        "versions": _versions(folder),
        "settings": report["settings"],
    }


def _answers_our_questions(report: dict, trial: Trial) -> bool:
    """Return whether an evaluation is of the finished training, in the default settings."""
    asked = [(setting["length"], setting["pairs"]) for setting in report["settings"]]
    wanted = [(setting.length, setting.pairs) for setting in default_settings(trial.recipe)]
    finished = report["step"] == trial.recipe.training.steps
    return finished and asked == wanted and not report.get("seed", 0)


def _versions(folder: RunFolder) -> dict[str, str]:
    """Return the versions that the training ran with, by package."""
    lines = folder.path.joinpath("versions.txt").read_text().splitlines()
    versions = dict(line.split(" ", 1) for line in lines)
    versions.pop("command", None)
    return versions
