"""``longspan rehearse``: run a recipe's training step on a GPU that is not here."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...trainer.errors import SilentRankError, UserError
from ..options import add_gpus, add_recipe_arguments, device_named, recipe_on_gpus, user_path

if TYPE_CHECKING:
    from ...trainer.predict.estimate import Device
    from ...trainer.recipe.schema import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the real training step of a recipe, one rank of it, on a GPU and beside ranks that "
        "are not here: its tensors have shapes and no numbers. Shows what would fail, what waits, "
        "which kernels are launched, what ranks send and the memory needed; exit status 1 if "
        "something would fail. Nothing is measured. Needs a C++ compiler once, and no GPU."
    )
    add_recipe_arguments(parser, example="model.num_hidden_layers=4")
    add_gpus(parser)
    parser.add_argument(
        "--rank", type=int, default=0, metavar="R", help="which of the ranks (default 0)"
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=1,
        metavar="N",
        help="equal documents in each sequence (default 1)",
    )
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="also write all that was found, in full"
    )


def run(options: argparse.Namespace) -> int:
    """Print what a rehearsal found; the exit status is 1 if something would fail."""
    from ..rehearsal.report import RehearsalReport

    device = device_named(options.device)
    recipe = recipe_on_gpus(options.recipe, options.overrides, options.gpus)
    _check(recipe, options)
    found = _rehearse(recipe, device, options.rank, options.documents)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print(RehearsalReport(found, recipe, device, options.rank, options.documents))
    return 1 if found["faults"] else 0


def _check(recipe: "Recipe", options: argparse.Namespace) -> None:
    ranks = recipe.launch.processes
    if not 0 <= options.rank < ranks:
        raise UserError(f"--rank: must be 0 to {ranks - 1}, got {options.rank}")
    most = recipe.training.seq_length // recipe.model.document_alignment
    if not 1 <= options.documents <= most:
        raise UserError(
            f"--documents: must be 1 to {most}, the aligned documents that fit into "
            f"training.seq_length, got {options.documents}"
        )


def _rehearse(recipe: "Recipe", device: "Device", rank: int, documents: int) -> dict[str, Any]:
    """Return what a process of its own found: torch there believes in the GPU."""
    from ...trainer.recipe.file import to_yaml

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(to_yaml(recipe))
        out = Path(folder, "found.json")
        worker = [sys.executable, "-m", "longspan.launch.workers.rehearse", str(file)]
        arguments = [
            f"--device={device.name}", f"--rank={rank}", f"--documents={documents}", f"--out={out}",
        ]  # fmt: skip
        status = subprocess.run([*worker, *arguments]).returncode
        if status:
            raise SilentRankError(status)
        return json.loads(out.read_text())
