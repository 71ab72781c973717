"""``longspan show-pattern``: a picture of what each KV head sees."""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...attention.patterns import Pattern
from ...attention.patterns.expression import parse_pattern
from ...attention.patterns.rules import Rule
from ...trainer.errors import UserError
from ...trainer.recipe.file import load_recipe

CELLS = 512
"""Cells along an axis of a picture at most: about what a panel has pixels for."""
SAMPLES = 8
"""Positions looked at along an axis of a cell at most."""
SHOWN_HEADS = 8
FUTURE, HIDDEN, VISIBLE = "#d9dde2", "white", "tab:blue"


@dataclass(frozen=True)
class Shown:
    """A pattern to draw; ``name`` is that of its block in the recipe, empty where it was given as an expression."""

    name: str
    pattern: Pattern
    heads: int
    length: int

    def __str__(self) -> str:
        return f"{self.name}: {self.pattern!r}" if self.name else repr(self.pattern)

    @property
    def density(self) -> float:
        """Visible share of the causal triangle over all heads."""
        return self.pattern.density(self.length, self.heads)

    @property
    def line(self) -> str:
        """What is told of it on the terminal."""
        covered = "covered" if self.pattern.covers(self.heads) else "not all covered"
        heads = f"the union of {self.heads} heads" if self.heads > 1 else "its one head"
        return (
            f"{self}: density {self.density:.4f} at {self.length:,} tokens, ideal speed-up {1 / self.density:.2f}x, "
            f"positions {covered} by {heads}"
        )

    @property
    def title(self) -> str:
        """What stands above its panels."""
        some = f", {SHOWN_HEADS} of its {self.heads} KV heads" if self.heads > SHOWN_HEADS else ""
        return f"{self}\ndensity {self.density:.4f} at {self.length:,} tokens{some}"


def show_pattern(text: str, out: str, heads: int | None, length: int | None) -> None:
    """Draw the pattern, or the patterns of the recipe, to ``out``, and print a line of each."""
    for option, value in {"--heads": heads, "--length": length}.items():
        if value is not None and value < 1:
            raise UserError(f"{option}: must be at least 1, got {value}")
    is_expression = "(" in text and not text.endswith(".yaml")
    rows = (
        [_of_expression(text, heads or 4, length)]
        if is_expression
        else _of_recipe(text, heads, length)
    )
    _draw(rows, Path(out))
    for row in rows:
        print(row.line)


def _of_expression(text: str, heads: int, length: int | None) -> Shown:
    try:
        pattern = parse_pattern(text).spread(heads)
        pattern.check(heads, length or 1)
    except ValueError as error:
        raise UserError(str(error)) from None
    return Shown("", pattern, heads, length or _telling_length(pattern, heads))


def _of_recipe(name: str, heads: int | None, length: int | None) -> list[Shown]:
    recipe = load_recipe(name)
    if heads is not None:
        raise UserError("--heads: goes with a pattern; a recipe says how many heads it has")
    heads, length = recipe.model.kv_heads, length or recipe.training.seq_length
    blocks = {name: recipe.model.layers.blocks[name] for name in recipe.model.layers.pattern}
    patterns = {name: block.attention_pattern(heads) for name, block in blocks.items()}
    shown = [
        Shown(name, pattern, heads, length)
        for name, pattern in patterns.items()
        if isinstance(pattern, Pattern)
    ]
    if not shown:
        raise UserError(
            f"{name}: has no block of softmax attention whose pattern is known before it sees a text"
        )
    return shown


def _telling_length(pattern: Pattern, heads: int) -> int:
    """A power of two at which the parts of the pattern can be told apart: four times the largest of them or more."""
    largest = max(_tokens(rule) for head in range(heads) for rule in pattern.rules(head))
    return min(8192, 1 << max(6, math.ceil(math.log2(4 * largest))))


def _tokens(rule: Rule) -> int:
    return max(rule.block * max(rule.reach or 1, rule.step), rule.stop or 1)


def visible_shares(pattern: Pattern, heads: int, length: int) -> np.ndarray:
    """Which share of the causal pairs in each cell is visible: ``[heads, cells, cells]``, NaN where there are none.

    Up to ``CELLS * SAMPLES`` tokens all pairs are counted, beyond that those of random positions of each cell: positions at
    equal distances would all fall on the same side of a dilated pattern.
    """
    strata = min(length, CELLS * SAMPLES)
    edges = np.arange(strata + 1) * length // strata
    at = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    cells = min(length, CELLS)
    starts = -(-np.arange(cells) * strata // cells)
    shares = np.empty((heads, cells, cells), np.float32)
    for row, queries in enumerate(np.split(at, starts[1:])):
        visible = np.add.reduceat(pattern.mask(queries, at, heads).numpy().sum(1), starts, -1)
        causal = np.add.reduceat((queries[:, None] >= at).sum(0), starts)
        shares[:, row] = np.where(causal, visible / np.maximum(causal, 1), np.nan)
    return shares


def _draw(rows: list[Shown], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("visible", [HIDDEN, VISIBLE]).with_extremes(
        bad=FUTURE
    )
    panels = max(min(row.heads, SHOWN_HEADS) for row in rows)
    figure = plt.figure(figsize=(max(3.9 * panels, 5.5), 4.6 * len(rows)), layout="constrained")
    for part, row in zip(figure.subfigures(len(rows), squeeze=False)[:, 0], rows, strict=True):
        width = int(11 * figure.get_figwidth())
        part.suptitle(
            "\n".join(textwrap.fill(line, width) for line in row.title.splitlines()), fontsize=11
        )
        shares = visible_shares(row.pattern, min(row.heads, SHOWN_HEADS), row.length)
        for head, axes in enumerate(part.subplots(1, len(shares), squeeze=False)[0]):
            axes.imshow(
                shares[head], cmap=colours, vmin=0, vmax=1, extent=(0, row.length, row.length, 0)
            )
            axes.set(
                title=f"KV head {head}",
                xlabel="key (token)",
                ylabel="" if head else "query (token)",
            )
            axes.locator_params(nbins=5, integer=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # matplotlib's, of an ending that it does not know
        raise UserError(f"{path}: cannot be written: {error}") from None
    finally:
        plt.close(figure)
