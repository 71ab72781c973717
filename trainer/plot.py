"""Pictures of a run."""

from pathlib import Path

from .errors import UserError
from .run_folder import RunFolder


def plot_loss(folder: RunFolder) -> Path:
    """Draw the loss curve of a run, held-out points on it, to ``plots/loss.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = folder.read_metrics()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, style in (("train/loss", {"linewidth": 1.2}), ("eval/loss", {"marker": "o", "linewidth": 1.6})):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    if not axes.lines:
        raise UserError(f"{folder.metrics}: holds no losses yet")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.path.name)
    bits = [record for record in records if "eval/bits_per_byte" in record]
    if bits:
        ratio = bits[-1]["eval/bits_per_byte"] / bits[-1]["eval/loss"]
        right = axes.secondary_yaxis("right", functions=(lambda loss: loss * ratio, lambda value: value / ratio))
        right.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    folder.loss_plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder.loss_plot, dpi=130)
    plt.close(figure)
    return folder.loss_plot
