"""The work of ``longspan show-pattern``: a picture of what each KV head sees."""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..attention.patterns import ClosedFormPattern, Pattern
from ..attention.patterns.expression import parse_pattern
from ..attention.patterns.rules import Rule
from ..trainer.errors import UserError
from ..trainer.recipe.file import load_recipe

CELLS = 512
"""Cells along an axis of a picture at most: about as many as a panel has pixels."""
SAMPLES = 8
"""Positions that are looked at along an axis of a cell, at most."""
SHOWN_HEADS = 8
"""KV heads with a panel, at most."""
FUTURE = "#d9dde2"
HIDDEN = "white"
VISIBLE = "tab:blue"


@dataclass(frozen=True)
class PatternPicture:
    """A pattern to draw, over a number of KV heads and tokens."""

    name: str
    """Of its block in the recipe; empty for a pattern given as an expression."""
    pattern: Pattern
    num_kv_heads: int
    length: int

    def __str__(self) -> str:
        return f"{self.name}: {self.pattern!r}" if self.name else repr(self.pattern)

    @property
    def density(self) -> float:
        """Visible share of the causal triangle over all heads."""
        return self.pattern.density(self.length, self.num_kv_heads)

    @property
    def summary(self) -> str:
        """Its line on the terminal."""
        covered = "covered" if self.pattern.covers(self.num_kv_heads) else "not all covered"
        heads = "its one head"
        if self.num_kv_heads > 1:
            heads = f"the union of {self.num_kv_heads} heads"
        return (
            f"{self}: density {self.density:.4f} at {self.length:,} tokens, "
            f"ideal speed-up {1 / self.density:.2f}x, positions {covered} by {heads}"
        )

    @property
    def title(self) -> str:
        """The text above its panels."""
        title = f"{self}\ndensity {self.density:.4f} at {self.length:,} tokens"
        if self.num_kv_heads > SHOWN_HEADS:
            title += f", {SHOWN_HEADS} of its {self.num_kv_heads} KV heads"
        return title


def show_pattern(
    expression_or_recipe: str, out: str, num_kv_heads: int | None, length: int | None
) -> None:
    """Draw a pattern, or the patterns of a recipe, to ``out``, and print a line about each.

    Args:
        expression_or_recipe: a pattern such as ``"S2(64, 16, 16) | Sinks(4)"``, or the name or path
            of a recipe.
        out: the file; its suffix is the format.
        num_kv_heads: of the pattern (default 4); a recipe has its own.
        length: in tokens (default: enough to show the pattern's structure, or that of the recipe).
    """
    for option, value in {"--heads": num_kv_heads, "--length": length}.items():
        if value is not None and value < 1:
            raise UserError(f"{option}: must be at least 1, got {value}")

    is_expression = "(" in expression_or_recipe and not expression_or_recipe.endswith(".yaml")
    if is_expression:
        pictures = [_picture_of_expression(expression_or_recipe, num_kv_heads or 4, length)]
    else:
        pictures = _pictures_of_recipe(expression_or_recipe, num_kv_heads, length)

    _draw(pictures, Path(out))
    for picture in pictures:
        print(picture.summary)


def _picture_of_expression(
    expression: str, num_kv_heads: int, length: int | None
) -> PatternPicture:
    try:
        pattern = parse_pattern(expression).spread(num_kv_heads)
        pattern.check(num_kv_heads, length or 1)
    except ValueError as error:
        raise UserError(str(error)) from None
    length = length or _length_that_shows(pattern, num_kv_heads)
    return PatternPicture("", pattern, num_kv_heads, length)


def _pictures_of_recipe(
    recipe_name: str, num_kv_heads: int | None, length: int | None
) -> list[PatternPicture]:
    recipe = load_recipe(recipe_name)
    if num_kv_heads is not None:
        raise UserError("--heads: only for a pattern; a recipe has its own number of heads")
    num_kv_heads = recipe.model.kv_heads
    length = length or recipe.training.seq_length

    blocks = {name: recipe.model.layers.blocks[name] for name in recipe.model.layers.pattern}
    patterns = {name: block.attention_pattern(num_kv_heads) for name, block in blocks.items()}
    pictures = [
        PatternPicture(name, pattern, num_kv_heads, length)
        for name, pattern in patterns.items()
        if isinstance(pattern, Pattern)  # others choose keys by the content of the text
    ]
    if not pictures:
        raise UserError(
            f"{recipe_name}: has no block of softmax attention whose pattern is known without the "
            "text"
        )
    return pictures


def _length_that_shows(pattern: ClosedFormPattern, num_kv_heads: int) -> int:
    """Return a power of two, in tokens, at which the parts of the pattern can be told apart.

    It is at least four times the largest of them, but at most 8192.
    """
    largest = max(_extent(rule) for head in range(num_kv_heads) for rule in pattern.rules(head))
    return min(8192, 1 << max(6, math.ceil(math.log2(4 * largest))))


def _extent(rule: Rule) -> int:
    """Return the tokens after which a rule repeats, or ends."""
    return max(rule.block * max(rule.reach or 1, rule.step), rule.stop or 1)


def visible_shares(pattern: Pattern, num_kv_heads: int, length: int) -> np.ndarray:
    """Return the share of each cell's causal pairs that is visible.

    Up to ``CELLS * SAMPLES`` tokens all pairs are counted, beyond that those of random positions of
    each cell: positions at equal distances would all fall on the same side of a dilated pattern.

    Returns:
        float32 ``[kv_heads, cells, cells]``, NaN in cells without causal pairs.
    """
    # One position of every stratum.
    num_strata = min(length, CELLS * SAMPLES)
    edges = np.arange(num_strata + 1) * length // num_strata
    positions = np.random.default_rng(0).integers(edges[:-1], edges[1:])

    # The first position of every cell.
    num_cells = min(length, CELLS)
    starts = -(-np.arange(num_cells) * num_strata // num_cells)

    shares = np.empty((num_kv_heads, num_cells, num_cells), np.float32)
    for cell_row, queries in enumerate(np.split(positions, starts[1:])):
        mask = pattern.mask(queries, positions, num_kv_heads).numpy()  # [kv_heads, queries, keys]
        visible = np.add.reduceat(mask.sum(1), starts, -1)  # [kv_heads, cells]
        causal = np.add.reduceat((queries[:, None] >= positions).sum(0), starts)  # [cells]
        shares[:, cell_row] = np.where(causal, visible / np.maximum(causal, 1), np.nan)
    return shares


def _draw(pictures: list[PatternPicture], path: Path) -> None:
    """Draw a row of panels for each pattern, a panel for each KV head."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most_panels = max(min(picture.num_kv_heads, SHOWN_HEADS) for picture in pictures)
    figure = plt.figure(
        figsize=(max(3.9 * most_panels, 5.5), 4.6 * len(pictures)), layout="constrained"
    )
    subfigures = figure.subfigures(len(pictures), squeeze=False)[:, 0]
    for subfigure, picture in zip(subfigures, pictures, strict=True):
        _draw_panels(subfigure, picture, title_width=int(11 * figure.get_figwidth()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not know the suffix
        raise UserError(f"{path}: cannot be written: {error}") from None
    finally:
        plt.close(figure)


def _draw_panels(subfigure, picture: PatternPicture, title_width: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("visible", [HIDDEN, VISIBLE])
    colormap = shades.with_extremes(bad=FUTURE)

    lines = [textwrap.fill(line, title_width) for line in picture.title.splitlines()]
    subfigure.suptitle("\n".join(lines), fontsize=11)

    shares = visible_shares(picture.pattern, min(picture.num_kv_heads, SHOWN_HEADS), picture.length)
    for head, axes in enumerate(subfigure.subplots(1, len(shares), squeeze=False)[0]):
        extent = (0, picture.length, picture.length, 0)
        axes.imshow(shares[head], cmap=colormap, vmin=0, vmax=1, extent=extent)
        axes.set(
            title=f"KV head {head}", xlabel="key (token)", ylabel="" if head else "query (token)"
        )
        axes.locator_params(nbins=5, integer=True)
