"""What a recipe's data section means on this machine, checked before any process starts."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..errors import UserError
from ..recipe import Recipe
from .corpus import Corpus, check_corpus, fingerprint
from .mqar import MQARData
from .packing import HeldOutSamples, Mixture, PackedCorpus, Samples
from .stdlib import NAME, python_stdlib
from .tokenizer import recipe_tokenizer, recipe_vocab_size


class PreparedData(Protocol):
    """A recipe's data, found to be good."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each part of it, by its name: what a run in the same folder must have again to go on."""
        ...

    def samples(self, recipe: Recipe, vocab_size: int) -> tuple[Samples, HeldOutSamples | None]:
        """What is trained on, and what is held out."""
        ...


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

    def samples(self, recipe: Recipe, vocab_size: int) -> tuple[Mixture, PackedCorpus | None]:
        length, alignment, seed = recipe.training.seq_length, recipe.model.document_alignment, recipe.training.seed
        corpora = [Corpus(prefix, vocab_size) for prefix in self.sources]
        packed = [PackedCorpus(corpus, length, alignment, (seed, i)) for i, corpus in enumerate(corpora)]
        held_out = None
        if self.validation:
            held_out = PackedCorpus(Corpus(self.validation, vocab_size), length, alignment, None)
        return Mixture(packed, list(self.sources.values())), held_out


def prepare_data(recipe: Recipe) -> PreparedData:
    """Build the embedded corpus where it is asked for and missing, and check every file. Needs no process group.

    Raises:
        UserError: naming the key or file.
    """
    if recipe.data.mqar:
        return MQARData(recipe.data.mqar)
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
