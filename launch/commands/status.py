"""``longspan status``: show how far a run is, and which of its checkpoints are whole."""

import argparse

from ..table import Column, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN")


def run(options: argparse.Namespace) -> None:
    """Print the state of the run; reads every file of every checkpoint."""
    from ...trainer.checkpoint.files import describe
    from ...trainer.checkpoint.run_folder import RunFolder

    folder = RunFolder(options.run_dir)
    records = folder.read_metrics() if folder.metrics.is_file() else []
    last_step = records[-1]["step"] if records else 0
    user = f"running: {folder.user}" if folder.in_use() else "not running"
    print(f"{folder.path}: step {last_step} of {folder.recipe.training.steps}, {user}")

    rows = [("step", "saved at", "by", "size", "state")]
    for checkpoint, manifest, damage in describe(folder.checkpoints):
        try:
            size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
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
