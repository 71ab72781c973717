"""A run at one of its checkpoints: the weights, a few at a time, and the recipe they were trained
with.
"""

import warnings
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint.files import LOSS_SCALE, Checkpoint, DamagedError, checkpoints
from ..checkpoint.run_folder import RunFolder
from ..errors import UserError
from ..recipe.schema import Recipe
from .model_to_export import ModelToExport

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES

_PREFIX = "model."
"""Of the weights' names in a checkpoint."""


class SavedRun:
    """A run at one of its checkpoints, whose files are all there and undamaged.

    Args:
        run: the run's folder, or ``folder@STEP`` with the step of a checkpoint; without a step, the
            newest one.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """

    def __init__(self, run: str):
        path, _, step = run.rpartition("@")
        if not step.isdecimal():  # an @ in the folder's name
            path, step = run, ""
        self.folder = RunFolder(path)
        whole_recipe = self.folder.recipe
        self.checkpoint = _find_checkpoint(self.folder, int(step) if step else None)
        try:
            self.manifest = self.checkpoint.manifest()
            damage = self.checkpoint.damage(self.manifest)
        except DamagedError as error:
            damage = str(error)
        if damage:
            raise UserError(f"{self.checkpoint.path}: {damage}; {self._other_checkpoints()}")

        self.step = self.checkpoint.step
        self.recipe: Recipe = whole_recipe.at_step(max(0, self.step - 1))
        self.to_export = ModelToExport.of_recipe(self.recipe)

    def _other_checkpoints(self) -> str:
        """Return how to choose another checkpoint, as the end of a message."""
        steps = [
            str(other.step)
            for other in checkpoints(self.folder.checkpoints)
            if other.step != self.checkpoint.step
        ]
        if not steps:
            return "the run has no other checkpoint"
        available = ", ".join(steps)
        return f"choose another checkpoint with {self.folder.path}@STEP (available: {available})"

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the whole weights, by global name."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        return {
            name.removeprefix(_PREFIX): entry.size
            for name, entry in self._entries.items()
            if name.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    @property
    def training_dtype(self) -> str:
        """The dtype that the model was trained in."""
        name = self.recipe.training.dtype
        if name != "auto":
            return name
        if LOSS_SCALE in self._entries:
            return "float16"
        return "bfloat16" if self.manifest.ranks.startswith("cuda") else "float32"

    @cached_property
    def _entries(self) -> "dict[str, STORAGE_TYPES]":
        """What the checkpoint has, by name."""
        from torch.distributed.checkpoint import FileSystemReader

        return FileSystemReader(self.checkpoint.path).read_metadata().state_dict_metadata

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        """Read whole weights in fp32, by global name, on whatever ranks they were written. Needs no
        process group.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import FileSystemReader

        state = {f"{_PREFIX}{name}": torch.empty(self.shapes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.load(state, storage_reader=FileSystemReader(self.checkpoint.path), no_dist=True)
        return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def _find_checkpoint(folder: RunFolder, step: int | None) -> Checkpoint:
    """Return the checkpoint of ``step``, or the newest."""
    newest_first = checkpoints(folder.checkpoints)
    if not newest_first:
        raise UserError(f"{folder.path}: has no checkpoint yet; train the run until it saves one")
    if step is None:
        return newest_first[0]
    for checkpoint in newest_first:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in reversed(newest_first))
    raise UserError(f"{folder.path}: has no checkpoint of step {step} (available: {steps})")
