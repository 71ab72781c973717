"""``longspan status RUN``: how far a run is, and which of its checkpoints are whole."""

from ...trainer.checkpoint.files import describe
from ...trainer.checkpoint.run_folder import RunFolder


def status(folder: RunFolder) -> None:
    """Print it; every file of every checkpoint is read."""
    steps = folder.recipe.training.steps
    records = folder.read_metrics() if folder.metrics.is_file() else []
    logged = records[-1]["step"] if records else 0
    print(
        f"{folder.path}: step {logged} of {steps}, {f'running: {folder.user}' if folder.in_use() else 'not running'}"
    )
    rows = [("step", "saved at", "by", "size", "state")]
    for checkpoint, manifest, damage in describe(folder.checkpoints):
        try:
            size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
        except FileNotFoundError:  # a run has removed it meanwhile
            continue
        saved_at, ranks = (manifest.saved_at, manifest.ranks) if manifest else ("?", "?")
        rows.append(
            (str(checkpoint.step), saved_at, ranks, f"{size / 2**20:,.1f} MiB", damage or "whole")
        )
    if len(rows) == 1:
        print("no checkpoints yet")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
