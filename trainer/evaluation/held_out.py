"""Held-out text to measure a run on."""

from collections.abc import Iterator

import numpy as np

from ..data.corpus import Corpus
from ..data.corpus_check import check_corpus
from ..data.stdlib import PYTHON_STDLIB, python_stdlib
from ..data.tokenizer import Tokenizer, recipe_tokenizer, recipe_vocab_size
from ..errors import UserError
from ..recipe.schema import DataConfig, Recipe


def held_out_corpus(recipe: Recipe, prefix: str | None = None) -> Corpus:
    """Open the held-out corpus of a recipe, or another one that has the same tokenizer.

    Args:
        recipe: of the run.
        prefix: of the other corpus; None for the recipe's own.

    Raises:
        UserError: if there is none, or if its files are damaged or do not fit the recipe.
    """
    tokenizer = recipe_tokenizer(recipe)
    prefix = prefix or _own_prefix(recipe.data)
    if prefix is None:
        raise UserError(
            "data.validation: the run has no held-out text; name some with --data PREFIX"
        )
    if prefix == PYTHON_STDLIB:
        _, prefix = python_stdlib(tokenizer)
    vocab_size = recipe_vocab_size(recipe)
    check_corpus(prefix, tokenizer.identity, vocab_size)
    return Corpus(prefix, vocab_size)


def _own_prefix(data: DataConfig) -> str | None:
    if data.validation:
        return data.validation
    return PYTHON_STDLIB if PYTHON_STDLIB in (data.sources or {}) else None


class Haystack:
    """Text to hide things in: held-out documents one after another, over and over."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus = corpus
        self.tokenizer = tokenizer

    def text(self, num_tokens: int, random: np.random.Generator) -> list[int]:
        """Return ids from the beginning of a random document on, without the ends of documents.

        Raises:
            UserError: if no document holds any text.
        """
        ids: list[int] = []
        for document in self._documents_from(int(random.integers(len(self._corpus)))):
            if len(ids) >= num_tokens:
                break
            # One more than is missing, since the end of the document does not count.
            count = min(int(self._corpus.lengths[document]), num_tokens - len(ids) + 1)
            document_ids = self._corpus.read(document, 0, count)
            ids += document_ids[document_ids != self.tokenizer.end_of_document].tolist()
        return ids[:num_tokens]

    def _documents_from(self, first: int) -> Iterator[int]:
        """Yield the documents from the ``first`` on, over and over."""
        if not (self._corpus.lengths > 1).any():
            raise UserError(
                f"{self._corpus.prefix}: has no document of more than one token; use another corpus"
            )
        document = first
        while True:
            yield document
            document = (document + 1) % len(self._corpus)
