"""What follows from a recipe, derived once and handed on."""

from functools import cached_property

from ..recipe.schema import Recipe
from .tokenizer import recipe_vocab_size


class DerivedRecipe:
    """A recipe and what follows from it, each derived when it is first asked for and then kept.

    Reading a tokenizer costs a file of many megabytes, and the recipe of a stage is made by
    copying: whoever has this value need not ask the recipe again.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows, before padding."""
        return recipe_vocab_size(self.recipe)
