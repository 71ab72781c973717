"""The folder of a run: where its files are, and what they say."""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..errors import UserError
from ..file_locks import LockedError
from ..recipe.extension import Extension, WhenExtended
from ..recipe.file import load_recipe, to_yaml
from ..recipe.schema import Recipe
from ..versions import version_of
from .atomic import replace_file
from .files import checkpoint_path, checkpoints
from .kept_tokenizer import KeptTokenizer
from .lock import FolderLock
from .resume_rules import forbidden_changes
from .weights_file import weights_step, write_weights

if TYPE_CHECKING:
    import torch


class RunFolder:
    """The files of a run, and the rules for starting another one among them.

    ``recipe.yaml`` (resolved), ``data.json``, ``versions.txt``, ``metrics.jsonl``,
    ``extensions.json`` if ``training.steps`` was raised since the run began, ``tokenizer/`` (unless
    it is bytes), ``checkpoints/``, ``weights.safetensors``, ``plots/``, and ``eval/`` if the run
    was evaluated.

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
        self.tokenizer = KeptTokenizer(self.path / "tokenizer")
        self._data_file = self.path / "data.json"
        self._extensions_file = self.path / "extensions.json"
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

        steps_done = self.newest_step()
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
        except (OSError, ValueError, TypeError, RecursionError):
            raise UserError(
                f"{self._data_file}: is damaged; remove it if the data is the same"
            ) from None
        for name, fingerprint in fingerprints.items():
            if old_fingerprints.get(name, fingerprint) != fingerprint:
                changed = f"data: {name}: is not what the run in {self.path} began with"
                raise UserError(f"{changed}; restore it, or choose another run_dir")

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, or 0 if there is none."""
        return max((checkpoint.step for checkpoint in checkpoints(self.checkpoints)), default=0)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the folder for one run.

        Yields:
            Whether it is held: on a file system without locks, other runs are not kept out.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                is_held = stack.enter_context(self._lock.hold())
            except LockedError:
                raise UserError(
                    f"run_dir: {self.path} is in use by {self.user}; "
                    "wait for it, or choose another run_dir"
                ) from None
            except OSError as error:
                raise self._not_writable(error) from None
            yield is_held

    @property
    def user(self) -> str:
        """The process that holds the folder, or held it last."""
        return self._lock.holder

    def in_use(self) -> bool | None:
        """Return whether a run holds the folder, or None if the file system cannot tell."""
        return self._lock.is_held()

    def extensions(self) -> list[Extension]:
        """Return what has raised ``training.steps`` since the run began, in order.

        Raises:
            UserError: the file that says so is damaged.
        """
        if not self._extensions_file.exists():
            return []
        try:
            entries = json.loads(self._extensions_file.read_text())
            return [_extension(**entry) for entry in entries]
        except (OSError, ValueError, TypeError, RecursionError):
            raise UserError(
                f"{self._extensions_file}: is damaged; without it, the learning rate is that of a "
                "run that always had as many steps: remove the file if that is right"
            ) from None

    def remove_stop_file(self) -> bool:
        """Remove the file that asks a run to stop; return whether it was there.

        Raises:
            UserError: it cannot be removed.
        """
        try:
            self.stop_file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(
                f"{self.stop_file}: asks the run to stop and cannot be removed: {error.strerror}; "
                "remove it yourself"
            ) from None
        return True

    def begin(
        self,
        recipe: Recipe,
        step: int,
        fingerprints: dict[str, str],
        reads_special_tokens: bool = False,
        extensions: Sequence[Extension] = (),
    ) -> None:
        """Write what describes a run from ``step`` on: recipe, data, tokenizer and versions.

        Metrics of later steps are removed, because these steps are about to be made again.

        Args:
            fingerprints: of the data, for :meth:`require_same_data`.
            reads_special_tokens: whether the data has special tokens that its text spells.
            extensions: what has raised ``training.steps``.

        Raises:
            UserError: the files cannot be written.
        """
        try:
            self._begin(recipe, step, fingerprints, reads_special_tokens, extensions)
        except OSError as error:
            raise self._not_writable(error) from None

    def _begin(
        self,
        recipe: Recipe,
        step: int,
        fingerprints: dict[str, str],
        reads_special_tokens: bool,
        extensions: Sequence[Extension],
    ) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if extensions:  # before the recipe, from whose steps the next start knows the newest one
            entries = [extension._asdict() for extension in extensions]
            replace_file(self._extensions_file, json.dumps(entries, indent=1))
        replace_file(self.recipe_file, to_yaml(recipe))
        replace_file(self._data_file, json.dumps(fingerprints, indent=1))
        self.tokenizer.keep(recipe, reads_special_tokens)
        replace_file(self.path / "versions.txt", _versions())
        if self.metrics.is_file():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            replace_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of a run that exists, with the tokenizer that the run keeps.

        Raises:
            UserError: there is no run, its recipe cannot be read, or a layer of it was trained in a
                way that is no longer supported.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path}: not the folder of a run (it has no recipe.yaml)")
        recipe = self.tokenizer.read_by(load_recipe(str(self.recipe_file)))
        for name, block in recipe.model.layers.blocks.items():
            if problem := block.saved_run_problem():
                raise UserError(f"{self.recipe_file}: model.layers.blocks.{name}: {problem}")
        return recipe

    def read_metrics(self) -> list[dict]:
        """Return the records of ``metrics.jsonl``; none if there is no such file.

        Lines that a full disk or a killed run cut short are passed over, and whatever else is no
        record: a step and numbers.
        """
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            # Deeply nested brackets are a RecursionError.
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if _is_record(record):
                    records.append(record)
        return records

    def write_weights(self, dtypes: dict[str, "torch.dtype"], step: int) -> None:
        """Write the weights of the checkpoint of ``step`` to a file of their own.

        Args:
            dtypes: of the model's parameters, by global name; the checkpoint has all in fp32.

        Raises:
            UserError: they could not be written.
        """
        import torch

        from .shards import WholeTensors

        saved = WholeTensors(checkpoint_path(self.checkpoints, step))
        shapes_and_dtypes = {
            name: torch.empty(saved.shape(f"model.{name}"), dtype=dtype, device="meta")
            for name, dtype in dtypes.items()
        }
        write_weights(
            self.weights, shapes_and_dtypes, lambda name: saved.read(f"model.{name}"), step
        )

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
        """Write what an evaluation of the run's weights found.

        Raises:
            UserError: it cannot be written.
        """
        file = self.evaluation(name)
        content = {"step": self.weights_step(), **report}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        try:
            file.parent.mkdir(exist_ok=True)
            replace_file(file, text)
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from None

    def _not_writable(self, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(
            f"run_dir: {error.filename or self.path} cannot be written: {reason}; "
            "free some space if the disk is full, or choose another run_dir"
        )

    def _require_writable(self) -> None:
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"run_dir: {self.path} cannot be made or written; choose another run_dir"
            )


def _extension(at_step: int, old_steps: int, learning_rate: WhenExtended) -> Extension:
    """Return an extension as its file has it, or raise ValueError if there can be none such."""
    is_possible = 0 < at_step <= old_steps and learning_rate in get_args(WhenExtended)
    if not is_possible:
        raise ValueError
    return Extension(at_step, old_steps, learning_rate)


def _is_record(value: object) -> bool:
    """Return whether a line's value has what a record of metrics has: a step, and numbers."""
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    if not 0 <= value["step"] < 2**63:
        return False
    return all(type(number) in (int, float) for number in value.values())


def _versions() -> str:
    """Return the contents of ``versions.txt``: what is installed, where, and the command."""
    packages = ("longspan", "torch", "megatron-core", "deepspeed", "numpy", "python")
    lines = [
        f"{package} {version_of(package) or '(not installed as a package)'}" for package in packages
    ]
    lines.append(f"platform {platform.platform()}")
    lines.append(f"command {' '.join(sys.argv)}")
    return "\n".join(lines) + "\n"
