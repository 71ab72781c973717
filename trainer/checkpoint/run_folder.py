"""The files of a run."""

import contextlib
import fcntl
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..recipe.file import load_recipe, to_yaml
from ..recipe.schema import Recipe
from ..versions import version_of
from .files import checkpoints

if TYPE_CHECKING:
    from torch import Tensor

# What may differ between the runs that share a folder, one going on where the other stopped: nothing that was learned from.
_MAY_CHANGE = (
    "description",
    "run_dir",
    "training.steps",
    "training.micro_batch_size",
    "training.on_nonfinite",
    "training.max_skipped_steps",
    "parallel",
    "engine",
    "memory",
    "checkpoint",
    "evaluation",
    "metrics",
    "launch",
)


class RunFolder:
    """``recipe.yaml`` (resolved), ``versions.txt``, ``metrics.jsonl``, ``checkpoints/``, ``weights.safetensors``, ``plots/``,
    and ``eval/`` where the run was measured.

    ``lock`` is held while a run trains; ``STOP``, where someone makes it, asks that run to stop.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights.safetensors"
        self.loss_plot = self.path / "plots" / "loss.png"
        self.nonfinite = self.path / "nonfinite"
        self.stop_file = self.path / "STOP"
        self._data_file = self.path / "data.json"
        self._lock_file = self.path / "lock"

    def require_usable(self, recipe: Recipe) -> None:
        """Refuse a folder that cannot be made or written, is in use, or holds a run that ``recipe`` cannot go on with."""
        parent = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(
                f"run_dir: {self.path} cannot be made or written; choose another run_dir"
            )
        if not self.recipe_file.exists():
            return
        with self.lock():
            pass
        try:
            before = self.recipe
        except UserError as error:
            raise UserError(
                f"{error}\nrun_dir: {self.path} holds a run whose recipe cannot be read; choose another run_dir"
            ) from None
        done = max((checkpoint.step for checkpoint in checkpoints(self.checkpoints)), default=0)
        problems = [
            f"{key}: is {new!r}, but the run in {self.path} has {old!r}; set it back, or choose another run_dir"
            for key, old, new in _differences(
                _learned_from(before, done), _learned_from(recipe, done)
            )
        ]
        if done > recipe.training.steps:
            steps = recipe.training.steps
            problems.append(
                f"training.steps: {steps}, but the run in {self.path} has done {done}; raise it"
            )
        if problems:
            raise UserError("\n".join(problems))

    def require_same_data(self, data: dict[str, str]) -> None:
        """Refuse data that is not that with which the run in this folder began; ``data`` has its fingerprints by name."""
        if not self._data_file.exists():
            return
        try:
            before = dict(json.loads(self._data_file.read_text()))
        except (ValueError, TypeError):
            raise UserError(
                f"{self._data_file}: is damaged; remove it if the data is the same"
            ) from None
        for name in data:
            if before.get(name, data[name]) != data[name]:
                changed = f"data: {name}: is not what the run in {self.path} began with"
                raise UserError(f"{changed}; bring that back, or choose another run_dir")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run; the lock goes with the process, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run_dir: {self.path} is in use by {self.user}; wait for it, or choose another run_dir"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    @property
    def user(self) -> str:
        """Who holds the lock, or held it last."""
        return self._lock_file.read_text() or "another process"

    def in_use(self) -> bool:
        """Whether a run holds the folder."""
        if not self._lock_file.exists():
            return False
        with self._lock_file.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def begin(self, recipe: Recipe, step: int, data: dict[str, str]) -> None:
        """Write what describes a run from ``step`` on, and forget metrics of later steps, which are about to be made again.

        ``data`` has its fingerprints, for :meth:`require_same_data`.
        """
        self.loss_plot.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        replace_file(self.recipe_file, to_yaml(recipe))
        replace_file(self._data_file, json.dumps(data, indent=1))
        packages = ("longspan", "torch", "megatron-core", "deepspeed", "numpy", "python")
        lines = [
            f"{package} {version_of(package) or '(not installed as a package)'}"
            for package in packages
        ]
        lines += [f"platform {platform.platform()}", f"command {' '.join(sys.argv)}"]
        replace_file(self.path / "versions.txt", "\n".join(lines) + "\n")
        if self.metrics.exists():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            replace_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def write_weights(self, weights: dict[str, "Tensor"], step: int) -> None:
        """Of the run after ``step``, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        partial = self.weights.with_suffix(".partial")
        try:
            save_file(weights, partial, {"step": str(step)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(self.weights)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            again = "the checkpoint is whole: the same command writes it again"
            raise UserError(f"{self.weights}: could not be written: {error}; {again}") from None

    def evaluation(self, name: str) -> Path:
        """The file with what ``longspan eval NAME`` found."""
        return self.path / "eval" / f"{name}.json"

    def require_evaluation(self, name: str) -> None:
        """Refuse what :meth:`write_evaluation` could not write."""
        file = self.evaluation(name)
        if not os.access(file.parent if file.parent.exists() else self.path, os.W_OK | os.X_OK):
            raise UserError(f"{file}: cannot be written")

    def require_weights(self) -> None:
        """Refuse a run that has none."""
        if not self.weights.is_file():
            raise UserError(f"{self.path}: has no weights.safetensors; the run has not finished")

    def weights_recipe(self) -> Recipe:
        """Of the stage that the weights are of, which is not the last where a run was lengthened and stopped."""
        return self.recipe.at(max(0, (self.weights_step() or self.recipe.training.steps) - 1))

    def write_evaluation(self, name: str, report: dict) -> None:
        """What the model of this run's weights was found to do."""
        file = self.evaluation(name)
        file.parent.mkdir(exist_ok=True)
        replace_file(
            file,
            json.dumps({"step": self.weights_step(), **report}, indent=1, allow_nan=False) + "\n",
        )

    def weights_step(self) -> int | None:
        """The step that the weights are of; None where there are none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.weights, "pt") as file:
                return int(file.metadata()["step"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return None

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of a run that exists."""
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path}: not the folder of a run (it has no recipe.yaml)")
        return load_recipe(str(self.recipe_file))

    def read_metrics(self) -> list[dict]:
        """The records of metrics.jsonl, but for lines that a full disk or a killed run cut short."""
        if not self.metrics.is_file():
            raise UserError(f"{self.metrics}: no such file; the run has logged nothing yet")
        records = []
        for line in self.metrics.read_text().splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records


def _learned_from(recipe: Recipe, done: int) -> dict:
    """What of a recipe must stay as it is in a run that has done so many steps."""
    moe, content = recipe.model.moe, recipe.model_dump(mode="json")
    balanced = (
        moe is not None and moe.router_aux_loss_coef > 0
    )  # over the sequences of a microbatch
    for key in _MAY_CHANGE:
        if key != "training.micro_batch_size" or not balanced:
            *sections, name = key.split(".")
            reduce(dict.__getitem__, sections, content).pop(name)
    content["stages"] = [stage for stage in content["stages"] if stage["from_step"] < done]
    return content


def _differences(old: object, new: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, old, new) of all that differs between two nested mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".removeprefix("."))
    elif old != new:
        yield key, old, new


def replace_file(path: Path, text: str) -> None:
    """Write a file whole: a run that is killed here leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
