"""Pictures of a run."""

import io
from pathlib import Path

from ..checkpoint.atomic import replace_file
from ..checkpoint.run_folder import RunFolder
from ..errors import UserError

_NEIGHBORS = 4
"""Points on each side that a smoothed training loss averages over."""


def plot_loss(folder: RunFolder) -> Path:
    """Draw the training and held-out losses of a run to ``plots/loss.png``; return that path.

    Raises:
        UserError: no loss has been logged yet, or the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not folder.metrics.is_file():
        raise UserError(f"{folder.metrics}: no such file; the run has logged nothing yet")
    records = folder.read_metrics()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")

    steps, losses = _points(records, "train/loss")
    if steps:
        # A step's loss says as much about its few texts as about the model: show it faintly under a
        # running mean.
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.9)
        axes.plot(steps, _smoothed(losses), color="tab:blue", label="train/loss", linewidth=1.6)
    steps, losses = _points(records, "eval/loss")
    if steps:
        axes.plot(steps, losses, color="tab:orange", label="eval/loss", linewidth=1.6, marker="o")
    if not axes.lines:
        raise UserError(f"{folder.metrics}: holds no losses yet")

    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.path.name)
    with_bits = [
        record
        for record in records
        if "eval/bits_per_byte" in record and record.get("eval/loss", 0) > 0
    ]
    if with_bits:
        bits_per_nat = with_bits[-1]["eval/bits_per_byte"] / with_bits[-1]["eval/loss"]
        right_axis = axes.secondary_yaxis(
            "right", functions=(lambda loss: loss * bits_per_nat, lambda bits: bits / bits_per_nat)
        )
        right_axis.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()

    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    try:
        folder.loss_plot.parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder.loss_plot, picture.getvalue())
    except OSError as error:
        raise UserError(f"{folder.loss_plot}: cannot be written: {error.strerror}") from None
    return folder.loss_plot


def _points(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return the steps whose record has this metric, and its values."""
    with_metric = [record for record in records if name in record]
    return [record["step"] for record in with_metric], [record[name] for record in with_metric]


def _smoothed(values: list[float]) -> list[float]:
    """Return the mean of every value and its neighbors."""
    means = []
    for i in range(len(values)):
        window = values[max(0, i - _NEIGHBORS) : i + _NEIGHBORS + 1]
        means.append(sum(window) / len(window))
    return means
