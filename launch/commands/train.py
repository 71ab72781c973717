"""``longspan train``: train a recipe."""

import argparse

from ..options import add_recipe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a recipe: a file or a shipped name."
    add_recipe_arguments(parser, example="training.steps=100")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and its sizes, and stop"
    )


def run(options: argparse.Namespace) -> int:
    from ..training import train

    return train(options.recipe, options.overrides, options.dry_run)
