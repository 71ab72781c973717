"""Pictures of what was measured."""

from pathlib import Path

from matplotlib.figure import Figure

_PANELS = {"exact": "exact", "preferred": "preferred to a wrong one (chance 0.5)"}


def plot_position_loss(rows: list[dict], trained: int, path: Path, title: str) -> None:
    """``rows`` with length, documents, start, stop, loss, gain and error: a line for each length, and where training ended."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = {
        "loss": "held-out loss (nats per token)",
        "gain": "gain by text far back (nats per token)",
    }
    for axes, (name, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for length in dict.fromkeys(row["length"] for row in rows):
            mine = [row for row in rows if row["length"] == length and row[name] is not None]
            if not mine:
                continue
            places = [(row["start"] + row["stop"]) / 2 for row in mine]
            errors = [2 * (row["error"] or 0) for row in mine] if name == "gain" else None
            about = f"{mine[0]['documents']} documents of {length:,}"
            axes.errorbar(
                places, [row[name] for row in mine], errors, marker="o", capsize=2, label=about
            )
        if trained < rows[-1]["stop"]:
            axes.axvline(trained, color="grey", linestyle=":", label="trained up to here")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="place in the context (tokens)", ylabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def plot_needle(rows: list[dict], path: Path, title: str) -> None:
    """``rows`` with length, depth, exact and preferred: two maps."""
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    figure = Figure(figsize=(3 + 1.6 * len(lengths), 1.6 + 0.5 * len(depths)), layout="constrained")
    for axes, (name, label) in zip(
        figure.subplots(1, 2, sharey=True), _PANELS.items(), strict=True
    ):
        found = {(row["depth"], row["length"]): row[name] for row in rows}
        axes.imshow(
            [[found[depth, length] for length in lengths] for depth in depths],
            vmin=0,
            vmax=1,
            cmap="RdYlGn",
            aspect="auto",
        )
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                axes.text(j, i, f"{found[depth, length]:.2f}", ha="center", va="center")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="tokens", title=label)
    figure.axes[0].set_ylabel("depth of the needle")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def plot_tasks(rows: list[dict], path: Path, title: str) -> None:
    """``rows`` with task, length, exact and preferred: a line for each task."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, label) in zip(
        figure.subplots(1, 2, sharey=True), _PANELS.items(), strict=True
    ):
        for task in dict.fromkeys(row["task"] for row in rows):
            mine = [row for row in rows if row["task"] == task]
            axes.plot(
                [row["length"] for row in mine], [row[name] for row in mine], marker="o", label=task
            )
        lengths = sorted({row["length"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set(xlabel="tokens", ylabel=label, ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def plot_mqar(report: dict, path: Path, title: str) -> None:
    """Accuracy by the pairs to remember: a line for each length."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, rows = figure.subplots(), report["settings"]
    for length in dict.fromkeys(row["length"] for row in rows):
        mine = sorted((row["pairs"], row["accuracy"]) for row in rows if row["length"] == length)
        axes.plot(*zip(*mine, strict=True), marker="o", label=f"{length:,} tokens")
    axes.axhline(report["chance"], color="grey", linestyle=":", label="chance")
    pairs = sorted({row["pairs"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [str(each) for each in pairs])
    axes.set(xlabel="pairs", ylabel="accuracy", ylim=(-0.05, 1.05), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
