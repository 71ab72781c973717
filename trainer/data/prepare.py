"""What a recipe's data section means on this machine, checked before any process starts."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from ..errors import UserError
from ..recipe.schema import DataConfig, Recipe
from .buckets import BucketSteps
from .corpus import Corpus
from .corpus_check import check_corpus
from .corpus_files import fingerprint, read_record
from .mixture import Mixture
from .mqar import MQARData
from .packing import BestFitCorpus, PackedCorpus
from .samples import FixedLengthSteps, HeldOutSamples, Splits, StepSampler
from .stdlib import PYTHON_STDLIB, python_stdlib
from .tokenizer import recipe_tokenizer, recipe_vocab_size


class PreparedData(Protocol):
    """The data of a recipe, found to be good."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of each part by its name. A run can only be resumed with the same ones."""
        ...

    @property
    def reads_special_tokens(self) -> bool:
        """Whether a corpus was built with special tokens that its text spells."""
        ...

    @property
    def text(self) -> "CorpusData | None":
        """The corpora of the whole run; None if it trains on a task, or if its stages have data of
        their own.
        """
        ...

    def samples(self, recipe: Recipe, vocab_size: int) -> Splits:
        """Return what a recipe trains on and what it holds out.

        Args:
            recipe: the run's, or that of one of its stages.
            vocab_size: ids that the model knows.
        """
        ...


class Source(NamedTuple):
    """A corpus to train on."""

    name: str
    """As in the recipe."""
    prefix: str
    """Of its files on this machine."""
    weight: float
    """In the mixture."""


@dataclass(frozen=True)
class CorpusData:
    """The corpora of a recipe's data section, as they lie on this machine."""

    sources: tuple[Source, ...]
    validation: str | None
    """Prefix of the held-out corpus."""

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of each source by its name."""
        return {source.name: fingerprint(source.prefix) for source in self.sources}

    @property
    def reads_special_tokens(self) -> bool:
        records = [read_record(source.prefix) for source in self.sources]
        return any(record.reads_special_tokens for record in records if record)

    @property
    def text(self) -> "CorpusData":
        return self

    def samples(self, recipe: Recipe, vocab_size: int) -> Splits:
        training = self._training_steps(recipe, vocab_size)
        return Splits(training, self._held_out(recipe, vocab_size))

    def _training_steps(self, recipe: Recipe, vocab_size: int) -> StepSampler:
        length = recipe.training.seq_length
        alignment = recipe.model.document_alignment
        seed = recipe.training.seed
        sequences_per_step = recipe.training.global_batch_size
        corpora = [Corpus(source.prefix, vocab_size) for source in self.sources]
        weights = [source.weight for source in self.sources]

        if recipe.data.packing == "buckets":
            buckets = recipe.data.buckets
            return BucketSteps(
                list(zip(corpora, weights, strict=True)),
                longest=length,
                shortest=buckets.shortest,
                longest_per_step=sequences_per_step,
                alignment=alignment,
                odds=buckets.odds,
                cycle_steps=buckets.cycle_steps,
                seeds=(seed,),
            )
        packing = BestFitCorpus if recipe.data.packing == "best_fit" else PackedCorpus
        packed = [
            packing(corpus, length, alignment, (seed, number))
            for number, corpus in enumerate(corpora)
        ]
        return FixedLengthSteps(Mixture(packed, weights), length, sequences_per_step)

    def _held_out(self, recipe: Recipe, vocab_size: int) -> HeldOutSamples | None:
        if not self.validation:
            return None
        corpus = Corpus(self.validation, vocab_size)
        length = recipe.training.seq_length
        alignment = recipe.model.document_alignment
        packed = PackedCorpus(corpus, length, alignment, shuffle_seeds=None)
        return HeldOutSamples(packed, packed.samples_per_epoch)


@dataclass(frozen=True)
class StagedData:
    """The data of a run whose stages have data of their own."""

    stages: list[tuple[DataConfig, PreparedData]]

    @property
    def fingerprints(self) -> dict[str, str]:
        merged: dict[str, str] = {}
        for _, data in self.stages:
            merged |= data.fingerprints
        return merged

    @property
    def reads_special_tokens(self) -> bool:
        return any(data.reads_special_tokens for _, data in self.stages)

    @property
    def text(self) -> None:
        return None

    def samples(self, recipe: Recipe, vocab_size: int) -> Splits:
        data = next(data for section, data in self.stages if section == recipe.data)
        return data.samples(recipe, vocab_size)


def prepare_data(recipe: Recipe) -> PreparedData:
    """Check every file of a recipe's data; build the embedded corpus if the recipe names it.

    Needs no process group.

    Raises:
        UserError: naming the key or file that is wrong.
    """
    if not any(stage.data for stage in recipe.stages):
        return _prepare_section(recipe)
    stage_recipes = [recipe.at_step(start) for start in recipe.stage_starts]
    return StagedData([(stage.data, _prepare_section(stage)) for stage in stage_recipes])


def _prepare_section(recipe: Recipe) -> PreparedData:
    if recipe.data.mqar:
        return MQARData(recipe.data.mqar)
    tokenizer = recipe_tokenizer(recipe)
    vocab_size = recipe_vocab_size(recipe)

    weights = recipe.data.sources or {}
    validation = recipe.data.validation
    prefixes = {name: name for name in weights}
    if PYTHON_STDLIB in weights or validation == PYTHON_STDLIB:
        training_prefix, held_out_prefix = python_stdlib(tokenizer)
        if PYTHON_STDLIB in weights:
            prefixes[PYTHON_STDLIB] = training_prefix
        if validation in (None, PYTHON_STDLIB):
            validation = held_out_prefix
    if not validation:
        _refuse_held_out_use(recipe)

    for prefix in prefixes.values():
        check_corpus(prefix, tokenizer.identity, vocab_size)
    if validation:
        check_corpus(validation, tokenizer.identity, vocab_size)
    sources = [Source(name, prefixes[name], weight) for name, weight in weights.items()]
    return CorpusData(tuple(sources), validation)


def _refuse_held_out_use(recipe: Recipe) -> None:
    """Refuse a recipe without held-out data that asks for what needs some."""
    needs_held_out = {
        "interval": recipe.evaluation.interval,
        "ngram_baseline": recipe.evaluation.ngram_baseline,
    }
    for key, value in needs_held_out.items():
        if value:
            raise UserError(
                f"evaluation.{key}: there is no held-out data; "
                f"set data.validation, or {key} to 0 or false"
            )
