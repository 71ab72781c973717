"""What ``longspan bench mqar`` leaves: all results as JSON, a table in a page, and a picture."""

import datetime
import json
import os
import platform
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes

from ...trainer.checkpoint.atomic import replace_file
from ...trainer.errors import UserError
from ...trainer.evaluation.mqar_settings import RecallSetting, trained_settings
from ...trainer.recipe.schema import Recipe

BEGIN = "<!-- longspan bench mqar: begin -->"
END = "<!-- longspan bench mqar: end -->"
"""The table stands between these two lines of the page; the text around them is left as it is."""


@dataclass
class RecipeResult:
    """A recipe at its best learning rate."""

    recipe: str
    lr: float
    state_bytes: int
    """Of one sequence of the trained length, over all layers, fp32."""
    accuracy: list[dict]
    """Of every setting: ``length``, ``pairs``, ``trained``; ``mean``, ``min``, ``max`` of seeds."""
    diverged: int
    """Trainings, at any learning rate, whose loss became infinite or NaN; they count as 0."""

    @property
    def hardest_trained(self) -> dict:
        """Its accuracy in the hardest setting that was trained."""
        return [cell for cell in self.accuracy if cell["trained"]][-1]


class MQARReport:
    """The files ``OUT.json``, ``OUT.md`` and ``OUT.png``.

    Raises:
        UserError: if they cannot be written, or the page that is there has no place for the table.
    """

    def __init__(self, out: Path):
        self._json = Path(f"{out}.json")
        self._page = Path(f"{out}.md")
        self._picture = Path(f"{out}.png")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {out.parent} cannot be made: {error.strerror}") from None
        for path in (self._json, self._page, self._picture):
            existing = path if path.exists() else out.parent
            if path.is_dir() or not os.access(existing, os.W_OK):
                raise UserError(f"--out: {path} cannot be written")
        self._page_with("")  # raises if it has no place for the table

    def write(self, recipes: dict[str, Recipe], results: list[dict]) -> str:
        """Write all three files, and return the table.

        Args:
            recipes: by name.
            results: of all trainings of these recipes.
        """
        rows = [
            _best(name, recipe, [result for result in results if result["recipe"] == name])
            for name, recipe in recipes.items()
        ]
        rows.sort(key=lambda row: -row.hardest_trained["mean"])
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": platform.platform(),
            "rows": [asdict(row) for row in rows],
            "results": results,
        }
        table = f"{_table(rows)}\n\n{_note(recipes, results)}"
        replace_file(self._json, json.dumps(report, indent=1) + "\n")
        replace_file(self._page, self._page_with(table))
        _draw(rows, self._picture)
        return f"{table}\n\n{self._json}, {self._page} and {self._picture} have it"

    def _page_with(self, table: str) -> str:
        """Return the page with this table in its place."""
        try:
            text = self._page.read_text() if self._page.exists() else f"{BEGIN}\n{END}\n"
        except UnicodeDecodeError:
            raise UserError(f"{self._page}: is not UTF-8 text") from None
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise UserError(
                f"{self._page}: has no place for the table; put these two lines there: "
                f"{BEGIN} and {END}"
            )
        return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _best(name: str, recipe: Recipe, results: list[dict]) -> RecipeResult:
    """Return the result of the best learning rate.

    That is the one with the best mean over the seeds in the hardest setting that was trained.
    """
    from ...trainer.predict.flops import state_bytes

    trained = trained_settings(recipe)
    accuracy_of_lr = {}
    for lr in sorted({result["lr"] for result in results}):
        of_lr = [result for result in results if result["lr"] == lr]
        accuracy_of_lr[lr] = list(_over_seeds(of_lr, trained))

    def hardest_mean(lr: float) -> float:
        return next(
            cell["mean"]
            for cell in accuracy_of_lr[lr]
            if RecallSetting(cell["length"], cell["pairs"]) == trained[-1]
        )

    best_lr = max(accuracy_of_lr, key=hardest_mean)
    return RecipeResult(
        recipe=name,
        lr=best_lr,
        state_bytes=state_bytes(recipe.model, recipe.training.seq_length),
        accuracy=accuracy_of_lr[best_lr],
        diverged=sum(result["diverged"] for result in results),
    )


def _over_seeds(results: list[dict], trained: list[RecallSetting]) -> Iterator[dict]:
    """Yield for each setting the mean and the range of the seeds' accuracies."""
    accuracies: dict[RecallSetting, list[float]] = {}
    for result in results:
        for cell in result["settings"]:
            setting = RecallSetting(cell["length"], cell["pairs"])
            accuracies.setdefault(setting, []).append(cell["accuracy"])
    for setting, values in accuracies.items():
        yield {
            **asdict(setting),
            "trained": setting in trained,
            "mean": sum(values) / len(values),
            "min": min(values),
            "max": max(values),
        }


def _table(rows: list[RecipeResult]) -> str:
    """Return a table in Markdown, with a column for each setting."""
    trained_of_setting = {
        (cell["length"], cell["pairs"]): cell["trained"] for row in rows for cell in row.accuracy
    }
    headers = [
        f"{length}/{pairs}{'' if trained else '*'}"
        for (length, pairs), trained in trained_of_setting.items()
    ]
    lines = [
        _line(["recipe", "lr", *headers, "state bytes"]),
        _line(["---", *["---:"] * (len(headers) + 2)]),
    ]
    for row in rows:
        cells = {
            (cell["length"], cell["pairs"]): (
                f"{cell['mean']:.3f} ({cell['min']:.3f}-{cell['max']:.3f})"
            )
            for cell in row.accuracy
        }
        name = f"{row.recipe} ({row.diverged} runs diverged)" if row.diverged else row.recipe
        accuracies = (cells.get(setting, "-") for setting in trained_of_setting)
        lines.append(_line([name, f"{row.lr:g}", *accuracies, f"{row.state_bytes:,}"]))
    return "\n".join(lines)


def _note(recipes: dict[str, Recipe], results: list[dict]) -> str:
    """Return the text below the table."""
    chances = dict.fromkeys(
        f"{1 / recipe.data.mqar.values:.4f}" for recipe in recipes.values() if recipe.data.mqar
    )
    torch_versions = dict.fromkeys(result["versions"]["torch"] for result in results)
    note = (
        "Columns are length/pairs, * not trained. Mean accuracy (smallest - largest) over seeds "
        f"{_values(results, 'seed')} at the best of the learning rates {_values(results, 'lr')}, "
        f"after {_values(results, 'steps')} steps; {_values(results, 'examples')} examples of "
        f"each. Chance is {', '.join(chances)}. State bytes are of one sequence of the trained "
        f"length, in fp32. {datetime.date.today()}, torch {', '.join(torch_versions)}, "
        "one thread each."
    )
    return textwrap.fill(note, 128)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _values(results: list[dict], key: str) -> str:
    return ", ".join(f"{value:g}" for value in sorted({result[key] for result in results}))


def _draw(rows: list[RecipeResult], path: Path) -> None:
    """Draw accuracy against the bytes of the state to the left, and at all lengths to the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", sharey=True)
    colors = plt.get_cmap("tab20").colors
    for number, row in enumerate(rows):
        style = {
            "marker": "os^v"[number % 4],
            "color": colors[number % len(colors)],
            "capsize": 3,
            "elinewidth": 0.8,
        }
        hardest = row.hardest_trained
        left.errorbar(row.state_bytes, hardest["mean"], _error_bars([hardest]), **style)
        _draw_lengths(right, row, style)

    hardest_settings = dict.fromkeys(
        f"{row.hardest_trained['length']}/{row.hardest_trained['pairs']}" for row in rows
    )
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.set(
        xlabel="state bytes of one sequence",
        ylabel="accuracy",
        title=f"length/pairs {', '.join(hardest_settings)}, trained",
    )
    right.set(xlabel="length/pairs", title="at trained and longer lengths")
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_lengths(axes: Axes, row: RecipeResult, style: dict) -> None:
    """Draw the accuracy at every length, with the most pairs that it was asked with."""
    by_pairs = sorted(row.accuracy, key=lambda cell: cell["pairs"])
    most_pairs = {cell["length"]: cell for cell in by_pairs}
    cells = [most_pairs[length] for length in sorted(most_pairs)]
    settings = [f"{cell['length']}/{cell['pairs']}" for cell in cells]
    means = [cell["mean"] for cell in cells]
    axes.errorbar(settings, means, _error_bars(cells), label=row.recipe, **style)


def _error_bars(cells: list[dict]) -> list[list[float]]:
    """Return how far matplotlib's error bars go down, and up."""
    down = [cell["mean"] - cell["min"] for cell in cells]
    up = [cell["max"] - cell["mean"] for cell in cells]
    return [down, up]
