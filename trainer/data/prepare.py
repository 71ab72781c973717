"""What a recipe's data section means on this machine, checked before any process starts."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..errors import UserError
from ..recipe.schema import DataConfig, Recipe
from .buckets import Buckets
from .corpus import Corpus, check_corpus, fingerprint
from .mqar import MQARData
from .packing import BestFitCorpus, HeldOutSamples, Mixture, PackedCorpus
from .stdlib import NAME, python_stdlib
from .steps import FixedLengthSteps, StepSampler
from .tokenizer import recipe_tokenizer, recipe_vocab_size


class PreparedData(Protocol):
    """A recipe's data, found to be good."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each part of it, by its name: what a run in the same folder must have again to go on."""
        ...

    def samples(self, recipe: Recipe, vocab_size: int) -> tuple[StepSampler, HeldOutSamples | None]:
        """What is trained on, and what is held out; of a recipe that has this data, as a stage of a run may."""
        ...


@dataclass(frozen=True)
class CorpusData:
    """The prefixes that a recipe's data section means on this machine."""

    sources: dict[str, float]
    validation: str | None
    names: tuple[str, ...]
    """Of the sources, as the recipe has them."""

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of each source, by its name."""
        return {
            name: fingerprint(prefix) for name, prefix in zip(self.names, self.sources, strict=True)
        }

    def samples(self, recipe: Recipe, vocab_size: int) -> tuple[StepSampler, PackedCorpus | None]:
        length, alignment, seed = (
            recipe.training.seq_length,
            recipe.model.document_alignment,
            recipe.training.seed,
        )
        sequences, weights = recipe.training.global_batch_size, list(self.sources.values())
        corpora = [Corpus(prefix, vocab_size) for prefix in self.sources]
        held_out = None
        if self.validation:
            held_out = PackedCorpus(Corpus(self.validation, vocab_size), length, alignment, None)
        if recipe.data.packing == "buckets":
            chosen, mixed = recipe.data.buckets, list(zip(corpora, weights, strict=True))
            shape = length, chosen.shortest, sequences, alignment
            return Buckets(mixed, *shape, chosen.odds, chosen.cycle_steps, (seed,)), held_out
        kind = BestFitCorpus if recipe.data.packing == "best_fit" else PackedCorpus
        packed = [kind(corpus, length, alignment, (seed, i)) for i, corpus in enumerate(corpora)]
        return FixedLengthSteps(Mixture(packed, weights), length, sequences), held_out


@dataclass(frozen=True)
class StagedData:
    """Of a run whose stages have data of their own."""

    stages: list[tuple[DataConfig, "PreparedData"]]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {
            name: digest for _, data in self.stages for name, digest in data.fingerprints.items()
        }

    def samples(self, recipe: Recipe, vocab_size: int) -> tuple[StepSampler, HeldOutSamples | None]:
        return next(data for section, data in self.stages if section == recipe.data).samples(
            recipe, vocab_size
        )


def prepare_data(recipe: Recipe) -> PreparedData:
    """Build the embedded corpus where it is asked for and missing, and check every file. Needs no process group.

    Raises:
        UserError: naming the key or file.
    """
    if any(stage.data for stage in recipe.stages):
        return StagedData(
            [(now.data, _prepare(now)) for now in map(recipe.at_step, recipe.stage_starts)]
        )
    return _prepare(recipe)


def _prepare(recipe: Recipe) -> PreparedData:
    if recipe.data.mqar:
        return MQARData(recipe.data.mqar)
    tokenizer, vocab_size = recipe_tokenizer(recipe), recipe_vocab_size(recipe)
    sources, validation = dict(recipe.data.sources), recipe.data.validation
    if NAME in sources or validation == NAME:
        train, held_out = python_stdlib(tokenizer)
        sources = {
            train if prefix == NAME else prefix: weight for prefix, weight in sources.items()
        }
        validation = held_out if validation in (None, NAME) else validation
    if not validation:
        for key, value in {
            "interval": recipe.evaluation.interval,
            "ngram_baseline": recipe.evaluation.ngram_baseline,
        }.items():
            if value:
                raise UserError(
                    f"evaluation.{key}: there is no held-out data; set data.validation, or {key} to 0 or false"
                )
    for prefix in (*sources, *([validation] if validation else [])):
        check_corpus(prefix, tokenizer.identity, vocab_size)
    return CorpusData(sources, validation, tuple(recipe.data.sources))
