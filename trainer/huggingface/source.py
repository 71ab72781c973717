"""What is exported of a run: a checkpoint's weights, one after another, and the recipe that they were trained with."""

import warnings
from functools import cached_property

import torch
from torch import Tensor

from ..checkpoint.files import Checkpoint, DamagedError, checkpoints
from ..checkpoint.run_folder import RunFolder
from ..data.tokenizer import recipe_vocab_size
from ..errors import UserError
from ..recipe.schema import Recipe
from .native import ModelToExport


class SavedRun:
    """A run at one of its checkpoints, which is whole.

    Args:
        run: the run's folder, or ``folder@NUMBER`` with a checkpoint's step; without one, the newest.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """

    def __init__(self, run: str):
        path, _, step = run.rpartition("@")
        if not step.isdecimal():
            path, step = run, ""
        self.folder = RunFolder(path)
        whole = self.folder.recipe
        self.checkpoint = _chosen(self.folder, int(step) if step else None)
        try:
            self.manifest = self.checkpoint.manifest()
            damage = self.checkpoint.damage(self.manifest)
        except DamagedError as error:
            damage = str(error)
        if damage:
            known = [
                str(other.step)
                for other in checkpoints(self.folder.checkpoints)
                if other.step != self.checkpoint.step
            ]
            others = f"; there are also {', '.join(known)}" if known else ""
            raise UserError(
                f"{self.checkpoint.path}: {damage}; choose another with {path}@STEP{others}"
            )
        self.step = self.checkpoint.step
        self.recipe: Recipe = whole.at_step(max(0, self.step - 1))
        self.source = ModelToExport(
            self.recipe.model, recipe_vocab_size(self.recipe), self.recipe.training.seq_length
        )

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the weights, by their global names."""
        from torch.distributed.checkpoint import FileSystemReader

        entries = FileSystemReader(self.checkpoint.path).read_metadata().state_dict_metadata
        return {
            name.removeprefix("model."): entry.size
            for name, entry in entries.items()
            if name.startswith("model.")
        }

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        """Whole, fp32, whatever ranks wrote them. Needs no process group."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import FileSystemReader

        state = {f"model.{name}": torch.empty(self.shapes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.load(state, storage_reader=FileSystemReader(self.checkpoint.path), no_dist=True)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _chosen(folder: RunFolder, step: int | None) -> Checkpoint:
    found = checkpoints(folder.checkpoints)
    if not found:
        raise UserError(f"{folder.path}: has no checkpoint yet")
    for checkpoint in found:
        if step in (None, checkpoint.step):
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in reversed(found))
    raise UserError(f"{folder.path}: has no checkpoint of step {step}; there are {steps}")
