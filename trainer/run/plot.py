"""Pictures of a run."""

from pathlib import Path

from ..checkpoint.run_folder import RunFolder
from ..errors import UserError


def plot_loss(folder: RunFolder) -> Path:
    """Draw the loss curve of a run, held-out points on it, to ``plots/loss.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = folder.read_metrics()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, colour in (("train/loss", "tab:blue"), ("eval/loss", "tab:orange")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if not points:
            continue
        steps, losses = zip(*points, strict=True)
        if (
            name == "train/loss"
        ):  # a step's loss says as much about its few texts as about the model
            axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.9)
            losses = [
                sum(near) / len(near)
                for near in (losses[max(0, i - 4) : i + 5] for i in range(len(losses)))
            ]
        axes.plot(
            steps,
            losses,
            color=colour,
            label=name,
            linewidth=1.6,
            marker="o" if name == "eval/loss" else None,
        )
    if not axes.lines:
        raise UserError(f"{folder.metrics}: holds no losses yet")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.path.name)
    bits = [record for record in records if "eval/bits_per_byte" in record]
    if bits:
        ratio = bits[-1]["eval/bits_per_byte"] / bits[-1]["eval/loss"]
        right = axes.secondary_yaxis(
            "right", functions=(lambda loss: loss * ratio, lambda value: value / ratio)
        )
        right.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    folder.loss_plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder.loss_plot, dpi=130)
    plt.close(figure)
    return folder.loss_plot
