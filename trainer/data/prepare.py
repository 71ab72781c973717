"""What a recipe's data section means on this machine, checked before any process starts."""

from dataclasses import dataclass
from functools import cached_property

from ..errors import UserError
from ..recipe import Recipe
from .corpus import check_corpus, fingerprint
from .stdlib import NAME, python_stdlib
from .tokenizer import recipe_tokenizer, recipe_vocab_size


@dataclass(frozen=True)
class DataPaths:
    """The prefixes that a recipe's data section means on this machine."""

    sources: dict[str, float]
    validation: str | None
    names: tuple[str, ...]
    """Of the sources, as the recipe has them."""

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of each source, by its name."""
        return {name: fingerprint(prefix) for name, prefix in zip(self.names, self.sources, strict=True)}


def prepare_data(recipe: Recipe) -> DataPaths:
    """Build the embedded corpus where it is asked for and missing, and check every file. Needs no process group.

    Raises:
        UserError: naming the key or file.
    """
    tokenizer, vocab_size = recipe_tokenizer(recipe), recipe_vocab_size(recipe)
    sources, validation = dict(recipe.data.sources), recipe.data.validation
    if NAME in sources or validation == NAME:
        train, held_out = python_stdlib(tokenizer)
        sources = {train if prefix == NAME else prefix: weight for prefix, weight in sources.items()}
        validation = held_out if validation in (None, NAME) else validation
    if not validation:
        for key, value in {"interval": recipe.evaluation.interval, "ngram_baseline": recipe.evaluation.ngram_baseline}.items():
            if value:
                raise UserError(f"evaluation.{key}: there is no held-out data; set data.validation, or {key} to 0 or false")
    for prefix in (*sources, *([validation] if validation else [])):
        check_corpus(prefix, tokenizer.identity, vocab_size)
    return DataPaths(sources, validation, tuple(recipe.data.sources))
