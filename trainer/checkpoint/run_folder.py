"""The folder of a run: where its files are, and what they say."""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..recipe.file import load_recipe, to_yaml
from ..recipe.schema import Recipe
from ..versions import version_of
from .atomic import replace_file
from .files import checkpoints
from .lock import FolderLock, LockedError
from .resume_rules import forbidden_changes
from .weights_file import weights_step, write_weights

if TYPE_CHECKING:
    from torch import Tensor


class RunFolder:
    """The files of a run, and the rules for starting another one among them.

    ``recipe.yaml`` (resolved), ``data.json``, ``versions.txt``, ``metrics.jsonl``,
    ``checkpoints/``, ``weights.safetensors``, ``plots/``, and ``eval/`` if the run was evaluated.

    ``lock`` is held while a run trains; ``STOP``, if someone makes it, asks that run to stop.
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
        self._lock = FolderLock(self.path / "lock")

    def require_usable(self, recipe: Recipe) -> None:
        """Check that a run of ``recipe`` can use the folder.

        It must be writable, not in use, and hold no run that the recipe cannot continue.

        Raises:
            UserError: naming every key that is in the way.
        """
        self._require_writable()
        if not self.recipe_file.exists():
            return
        with self.lock():
            pass
        try:
            old_recipe = self.recipe
        except UserError as error:
            raise UserError(
                f"{error}\nrun_dir: {self.path} holds a run whose recipe cannot be used; "
                "choose another run_dir"
            ) from None

        steps_done = max(
            (checkpoint.step for checkpoint in checkpoints(self.checkpoints)), default=0
        )
        problems = [
            f"{key}: is {new!r}, but the run in {self.path} has {old!r}; "
            "set it back, or choose another run_dir"
            for key, old, new in forbidden_changes(old_recipe, recipe, steps_done)
        ]
        steps = recipe.training.steps
        if steps_done > steps:
            problems.append(
                f"training.steps: {steps}, but the run in {self.path} has done {steps_done}; "
                "raise it"
            )
        if problems:
            raise UserError("\n".join(problems))

    def require_same_data(self, fingerprints: dict[str, str]) -> None:
        """Check that the data, by the fingerprint of each part, are those with which the run began.

        Raises:
            UserError: naming the part that has changed.
        """
        if not self._data_file.exists():
            return
        try:
            old_fingerprints = dict(json.loads(self._data_file.read_text()))
        except (ValueError, TypeError):
            raise UserError(
                f"{self._data_file}: is damaged; remove it if the data is the same"
            ) from None
        for name, fingerprint in fingerprints.items():
            if old_fingerprints.get(name, fingerprint) != fingerprint:
                changed = f"data: {name}: is not what the run in {self.path} began with"
                raise UserError(f"{changed}; restore it, or choose another run_dir")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run.

        Raises:
            UserError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._lock.hold())
            except LockedError:
                raise UserError(
                    f"run_dir: {self.path} is in use by {self.user}; "
                    "wait for it, or choose another run_dir"
                ) from None
            yield

    @property
    def user(self) -> str:
        """The process that holds the folder, or held it last."""
        return self._lock.holder

    def in_use(self) -> bool:
        """Return whether a run holds the folder."""
        return self._lock.is_held()

    def begin(self, recipe: Recipe, step: int, fingerprints: dict[str, str]) -> None:
        """Write what describes a run from ``step`` on: recipe, data and versions.

        Metrics of later steps are removed, because these steps are about to be made again. The
        ``fingerprints`` of the data are for :meth:`require_same_data`.
        """
        self.loss_plot.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        replace_file(self.recipe_file, to_yaml(recipe))
        replace_file(self._data_file, json.dumps(fingerprints, indent=1))
        replace_file(self.path / "versions.txt", _versions())
        if self.metrics.exists():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            replace_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of a run that exists.

        Raises:
            UserError: there is no run, its recipe cannot be read, or a layer of it was trained in a
                way that is no longer supported.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path}: not the folder of a run (it has no recipe.yaml)")
        recipe = load_recipe(str(self.recipe_file))
        for name, block in recipe.model.layers.blocks.items():
            if problem := block.saved_run_problem():
                raise UserError(f"{self.recipe_file}: model.layers.blocks.{name}: {problem}")
        return recipe

    def read_metrics(self) -> list[dict]:
        """Return the records of ``metrics.jsonl``.

        Lines that a full disk or a killed run cut short are left out.

        Raises:
            UserError: there are none.
        """
        if not self.metrics.is_file():
            raise UserError(f"{self.metrics}: no such file; the run has logged nothing yet")
        records = []
        for line in self.metrics.read_text().splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def write_weights(self, weights: dict[str, "Tensor"], step: int) -> None:
        """Write the run's weights after ``step``; see :func:`.weights_file.write_weights`."""
        write_weights(self.weights, weights, step)

    def weights_step(self) -> int | None:
        """Return the step that the run's weights are of, or None if it has none."""
        return weights_step(self.weights)

    def require_weights(self) -> None:
        """Raise UserError if the run has no weights."""
        if not self.weights.is_file():
            raise UserError(f"{self.path}: has no weights.safetensors; the run has not finished")

    def weights_recipe(self) -> Recipe:
        """Return the recipe of the stage that the weights are of.

        That is not the last stage if the run was given more steps and then stopped.
        """
        step = self.weights_step() or self.recipe.training.steps
        return self.recipe.at_step(max(0, step - 1))

    def evaluation(self, name: str) -> Path:
        """Return the path of the report of ``longspan eval NAME``."""
        return self.path / "eval" / f"{name}.json"

    def require_evaluation(self, name: str) -> None:
        """Raise UserError if :meth:`write_evaluation` could not write."""
        file = self.evaluation(name)
        folder = file.parent if file.parent.exists() else self.path
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{file}: cannot be written")

    def write_evaluation(self, name: str, report: dict) -> None:
        """Write what an evaluation of the run's weights found."""
        file = self.evaluation(name)
        file.parent.mkdir(exist_ok=True)
        content = {"step": self.weights_step(), **report}
        replace_file(file, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _require_writable(self) -> None:
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"run_dir: {self.path} cannot be made or written; choose another run_dir"
            )


def _versions() -> str:
    """Return the contents of ``versions.txt``: what is installed, where, and the command."""
    packages = ("longspan", "torch", "megatron-core", "deepspeed", "numpy", "python")
    lines = [
        f"{package} {version_of(package) or '(not installed as a package)'}" for package in packages
    ]
    lines.append(f"platform {platform.platform()}")
    lines.append(f"command {' '.join(sys.argv)}")
    return "\n".join(lines) + "\n"
