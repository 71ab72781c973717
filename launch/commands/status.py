"""``longspan status``: show how far a run is, and which of its checkpoints are whole."""

import argparse
from typing import TYPE_CHECKING

from ..options import user_path
from ..table import Column, table

if TYPE_CHECKING:
    from ...trainer.checkpoint.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=user_path, metavar="RUN")


def _use(folder: "RunFolder") -> str:
    """Return whether a run holds the folder, for people."""
    in_use = folder.in_use()
    if in_use is None:
        return f"last used by {folder.user} (its file system has no locks)"
    return f"running: {folder.user}" if in_use else "not running"


def run(options: argparse.Namespace) -> None:
    """Print the state of the run; reads every file of every checkpoint."""
    from ...trainer.checkpoint.files import describe
    from ...trainer.checkpoint.run_folder import RunFolder

    folder = RunFolder(options.run_dir)
    records = folder.read_metrics()
    last_step = records[-1]["step"] if records else 0
    print(f"{folder.path}: step {last_step} of {folder.recipe.training.steps}, {_use(folder)}")

    rows = [("step", "saved at", "by", "size", "state")]
    for checkpoint, manifest, damage in describe(folder.checkpoints):
        try:
            files = list(checkpoint.path.iterdir()) if checkpoint.path.is_dir() else []
            size = sum(file.stat().st_size for file in files)
        except FileNotFoundError:  # a run has removed it meanwhile
            continue
        rows.append(
            (
                str(checkpoint.step),
                manifest.saved_at if manifest else "?",
                manifest.ranks if manifest else "?",
                f"{size / 2**20:,.1f} MiB",
                damage or "whole",
            )
        )

    if len(rows) == 1:
        print("no checkpoints yet")
        return
    print(table(rows, [Column("left")] * len(rows[0])))
