"""Plots of what was measured."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_RETRIEVAL_PANELS = {"exact": "exact", "preferred": "preferred to a wrong answer (chance 0.5)"}
_POSITION_LOSS_PANELS = {
    "loss": "held-out loss (nats per token)",
    "gain": "gain from text far back (nats per token)",
}
_DPI = 130


def plot_position_loss(ranges: list[dict], trained: int, path: Path, title: str) -> None:
    """Draw loss and gain by position, a line for each length, and where training ended.

    Args:
        ranges: each with length, documents, start, stop, loss, gain and error.
        trained: tokens that the model was trained on.
        path: of the picture.
        title: above it.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (name, label) in zip(panels, _POSITION_LOSS_PANELS.items(), strict=True):
        for length in _distinct(ranges, "length"):
            points = [r for r in ranges if r["length"] == length and r[name] is not None]
            if not points:
                continue
            middles = [(point["start"] + point["stop"]) / 2 for point in points]
            values = [point[name] for point in points]
            errors = None
            if name == "gain":
                errors = [2 * (point["error"] or 0) for point in points]
            axes.errorbar(
                middles,
                values,
                errors,
                marker="o",
                capsize=2,
                label=f"{points[0]['documents']} documents of {length:,}",
            )
        if trained < ranges[-1]["stop"]:
            axes.axvline(trained, color="grey", linestyle=":", label="trained up to here")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="position in the context (tokens)", ylabel=label)
        axes.grid(alpha=0.3)
    _save(figure, path, title)


def plot_needle(results: list[dict], path: Path, title: str) -> None:
    """Draw two maps over length and depth.

    ``results`` have length, depth, exact and preferred.
    """
    lengths = sorted(_distinct(results, "length"))
    depths = sorted(_distinct(results, "depth"))
    figure = Figure(figsize=(3 + 1.6 * len(lengths), 1.6 + 0.5 * len(depths)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, label) in zip(panels, _RETRIEVAL_PANELS.items(), strict=True):
        by_place = {(result["depth"], result["length"]): result[name] for result in results}
        values = [[by_place[depth, length] for length in lengths] for depth in depths]
        axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, row_values in enumerate(values):
            for column, value in enumerate(row_values):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="tokens", title=label)
    figure.axes[0].set_ylabel("depth of the needle")
    figure.suptitle(title)
    figure.savefig(path, dpi=_DPI)


def plot_tasks(results: list[dict], path: Path, title: str) -> None:
    """Draw the answers by length, a line for each task.

    ``results`` have task, length, exact and preferred.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, label) in zip(panels, _RETRIEVAL_PANELS.items(), strict=True):
        for task in _distinct(results, "task"):
            points = [result for result in results if result["task"] == task]
            lengths = [point["length"] for point in points]
            axes.plot(lengths, [point[name] for point in points], marker="o", label=task)
        lengths = sorted(_distinct(results, "length"))
        _share_axes(axes, lengths, [f"{length:,}" for length in lengths])
        axes.set(xlabel="tokens", ylabel=label)
    _save(figure, path, title)


def plot_mqar(report: dict, path: Path, title: str) -> None:
    """Draw the accuracy by the number of pairs to remember, a line for each length.

    ``report`` is that of :func:`~.mqar.evaluate_mqar`.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    settings = report["settings"]
    for length in _distinct(settings, "length"):
        points = sorted((s["pairs"], s["accuracy"]) for s in settings if s["length"] == length)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{length:,} tokens")
    axes.axhline(report["chance"], color="grey", linestyle=":", label="chance")
    pairs = sorted(_distinct(settings, "pairs"))
    _share_axes(axes, pairs, [str(number) for number in pairs])
    axes.set(xlabel="pairs", ylabel="accuracy", title=title)
    axes.legend()
    figure.savefig(path, dpi=_DPI)


def _distinct(results: list[dict], key: str) -> list:
    """Return the different values of a key, in the order of the results."""
    return list(dict.fromkeys(result[key] for result in results))


def _share_axes(axes: Axes, ticks: Sequence[int], labels: Sequence[str]) -> None:
    """Set up a logarithmic axis with these ticks, against a share from 0 to 1."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels)
    axes.set(ylim=(-0.05, 1.05))
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=_DPI)
