"""What `longspan bench mqar` leaves: all results as JSON, a table inside a page, and a picture."""

import datetime
import json
import os
import platform
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ...trainer.checkpoint.run_folder import replace_file
from ...trainer.errors import UserError
from ...trainer.evaluation.mqar_settings import Setting, trained_settings
from ...trainer.recipe.schema import Recipe

BEGIN, END = "<!-- longspan bench mqar: begin -->", "<!-- longspan bench mqar: end -->"
"""The table stands between these two lines of the page; the text around them is left as it is."""


@dataclass
class Row:
    """A recipe at its best learning rate."""

    recipe: str
    lr: float
    state_bytes: int
    """Of one sequence of the trained length, over all layers, fp32."""
    accuracy: list[dict]
    """Of each setting: ``length``, ``pairs``, ``trained``, and ``mean``, ``min`` and ``max`` over the seeds."""
    diverged: int
    """Runs of this recipe, at any learning rate, whose loss became infinite or NaN; they count as 0."""

    @property
    def hardest_trained(self) -> dict:
        return [cell for cell in self.accuracy if cell["trained"]][-1]


class MQARReport:
    """``OUT.json``, ``OUT.md`` and ``OUT.png``.

    Raises:
        UserError: where they cannot be written, or the page that is there has no place for the table.
    """

    def __init__(self, out: Path):
        self._json, self._page, self._picture = (
            Path(f"{out}.{suffix}") for suffix in ("json", "md", "png")
        )
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {out.parent} cannot be made: {error.strerror}") from None
        for path in (self._json, self._page, self._picture):
            if path.is_dir() or not os.access(path if path.exists() else out.parent, os.W_OK):
                raise UserError(f"--out: {path} cannot be written")
        self._page_with("")

    def write(self, recipes: dict[str, Recipe], results: list[dict]) -> str:
        """Write all three from the ``results`` of all runs of ``recipes``; the table."""
        rows = [
            _row(name, recipe, [r for r in results if r["recipe"] == name])
            for name, recipe in recipes.items()
        ]
        rows.sort(key=lambda row: -row.hardest_trained["mean"])
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": platform.platform(),
            "rows": [asdict(row) for row in rows],
            "results": results,
        }
        table = _table(rows, recipes, results)
        replace_file(self._json, json.dumps(report, indent=1) + "\n")
        replace_file(self._page, self._page_with(table))
        _draw(rows, self._picture)
        return f"{table}\n\n{self._json}, {self._page} and {self._picture} have it"

    def _page_with(self, table: str) -> str:
        try:
            text = self._page.read_text() if self._page.exists() else f"{BEGIN}\n{END}\n"
        except UnicodeDecodeError:
            raise UserError(f"{self._page}: is no UTF-8 text") from None
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise UserError(
                f"{self._page}: has no place for the table; put these two lines there: {BEGIN} and {END}"
            )
        return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _row(name: str, recipe: Recipe, results: list[dict]) -> Row:
    """The best learning rate is that with the best mean over the seeds in the hardest setting that was trained."""
    from ...trainer.predict.flops import state_bytes

    trained = trained_settings(recipe)
    cells = {
        lr: list(_cells([r for r in results if r["lr"] == lr], trained))
        for lr in sorted({r["lr"] for r in results})
    }
    best = max(
        cells,
        key=lambda lr: next(
            c["mean"] for c in cells[lr] if Setting(c["length"], c["pairs"]) == trained[-1]
        ),
    )
    size = state_bytes(recipe.model, recipe.training.seq_length)
    return Row(name, best, size, cells[best], sum(r["diverged"] for r in results))


def _cells(results: list[dict], trained: list[Setting]) -> Iterator[dict]:
    """Of each setting what the seeds have reached."""
    reached: dict[Setting, list[float]] = {}
    for result in results:
        for cell in result["settings"]:
            reached.setdefault(Setting(cell["length"], cell["pairs"]), []).append(cell["accuracy"])
    for setting, values in reached.items():
        spread = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        yield {**asdict(setting), "trained": setting in trained, **spread}


def _table(rows: list[Row], recipes: dict[str, Recipe], results: list[dict]) -> str:
    settings = {(c["length"], c["pairs"]): c["trained"] for row in rows for c in row.accuracy}
    columns = [
        f"{length}/{pairs}{'' if trained else '*'}" for (length, pairs), trained in settings.items()
    ]
    lines = [
        _line(["recipe", "lr", *columns, "state bytes"]),
        _line(["---", *["---:"] * (len(columns) + 2)]),
    ]
    for row in rows:
        cells = {
            (c["length"], c["pairs"]): f"{c['mean']:.3f} ({c['min']:.3f}-{c['max']:.3f})"
            for c in row.accuracy
        }
        name = f"{row.recipe} ({row.diverged} runs diverged)" if row.diverged else row.recipe
        lines.append(
            _line(
                [
                    name,
                    f"{row.lr:g}",
                    *(cells.get(key, "-") for key in settings),
                    f"{row.state_bytes:,}",
                ]
            )
        )
    lrs, seeds, steps, asked = (_all(results, key) for key in ("lr", "seed", "steps", "examples"))
    chance = ", ".join(
        dict.fromkeys(f"{1 / recipe.data.mqar.values:.4f}" for recipe in recipes.values())
    )
    torch = ", ".join(dict.fromkeys(result["versions"]["torch"] for result in results))
    note = (
        f"Columns are length/pairs, * not trained. Mean accuracy (smallest - largest) over seeds {seeds} at the best of the "
        f"learning rates {lrs}, after {steps} steps; {asked} examples of each. Chance is {chance}. State bytes are of one "
        f"sequence of the trained length, in fp32. {datetime.date.today()}, torch {torch}, one thread each."
    )
    return "\n".join([*lines, "", textwrap.fill(note, 128)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _all(results: list[dict], key: str) -> str:
    return ", ".join(f"{value:g}" for value in sorted({result[key] for result in results}))


def _draw(rows: list[Row], path: Path) -> None:
    """Left accuracy against the bytes of the state, right at every length with the most pairs that it was asked with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", sharey=True)
    colours = plt.get_cmap("tab20").colors
    for i, row in enumerate(rows):
        style = {
            "marker": "os^v"[i % 4],
            "color": colours[i % len(colours)],
            "capsize": 3,
            "elinewidth": 0.8,
        }
        hardest = row.hardest_trained
        left.errorbar(row.state_bytes, hardest["mean"], _spread([hardest]), **style)
        by_length = {
            cell["length"]: cell for cell in sorted(row.accuracy, key=lambda cell: cell["pairs"])
        }
        cells = [by_length[length] for length in sorted(by_length)]
        at = [f"{cell['length']}/{cell['pairs']}" for cell in cells]
        right.errorbar(
            at, [cell["mean"] for cell in cells], _spread(cells), label=row.recipe, **style
        )
    title = ", ".join(
        dict.fromkeys(
            f"{row.hardest_trained['length']}/{row.hardest_trained['pairs']}" for row in rows
        )
    )
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.set(
        xlabel="state bytes of one sequence",
        ylabel="accuracy",
        title=f"length/pairs {title}, trained",
    )
    right.set(xlabel="length/pairs", title="at trained and longer lengths")
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _spread(cells: list[dict]) -> list[list[float]]:
    """Error bars of matplotlib: how far down and up."""
    return [
        [cell["mean"] - cell["min"] for cell in cells],
        [cell["max"] - cell["mean"] for cell in cells],
    ]
