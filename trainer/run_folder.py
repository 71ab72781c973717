"""The files of a run."""

import json
import os
import platform
import sys
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import UserError
from .recipe import Recipe
from .recipe_file import load_recipe, to_yaml


class RunFolder:
    """``recipe.yaml`` (resolved), ``versions.txt``, ``metrics.jsonl``, ``weights.safetensors``, ``plots/``."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.weights = self.path / "weights.safetensors"
        self.loss_plot = self.path / "plots" / "loss.png"

    def create(self, recipe: Recipe) -> None:
        """Write what describes the run."""
        self.loss_plot.parent.mkdir(parents=True, exist_ok=True)
        self.recipe_file.write_text(to_yaml(recipe))
        packages = ("longspan", "torch", "megatron-core", "numpy")
        lines = [f"python {platform.python_version()}", f"platform {platform.platform()}", f"command {' '.join(sys.argv)}"]
        self.path.joinpath("versions.txt").write_text("\n".join([*(f"{p} {_version(p)}" for p in packages), *lines]) + "\n")

    def require_new(self) -> None:
        """Refuse a folder that holds a run, or that cannot be made."""
        if self.recipe_file.exists():
            raise UserError(f"run_dir: {self.path} holds a run already; choose another run_dir or remove that folder")
        parent = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"run_dir: {self.path} cannot be made or written; choose another run_dir")

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of a run that exists."""
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path}: not the folder of a run (it has no recipe.yaml)")
        return load_recipe(str(self.recipe_file))

    def read_metrics(self) -> list[dict]:
        """The records of metrics.jsonl."""
        if not self.metrics.is_file():
            raise UserError(f"{self.metrics}: no such file; the run has logged nothing yet")
        lines = self.metrics.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a run may be writing the last one


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed as a package)"
