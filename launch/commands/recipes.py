"""``longspan recipes``: list the shipped recipes, or all keys of a recipe."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys",
        action="store_true",
        help="print every key with its values, default and meaning (Markdown)",
    )


def run(options: argparse.Namespace) -> None:
    if options.keys:
        from ...trainer.recipe.keys import recipe_keys

        print(recipe_keys(), end="")
        return

    from ...trainer.recipe.file import SHIPPED, load_recipe, shipped_recipes

    recipes = {
        str(path.relative_to(SHIPPED).with_suffix("")): load_recipe(str(path))
        for path in shipped_recipes()
    }
    width = max(map(len, recipes))
    for name, recipe in recipes.items():
        print(f"{name:<{width}}  {recipe.description}")
