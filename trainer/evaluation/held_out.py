"""Held-out text to measure a run on."""

from collections.abc import Iterator

import numpy as np

from ..data.corpus import Corpus, check_corpus
from ..data.stdlib import NAME, python_stdlib
from ..data.tokenizer import Tokenizer, recipe_tokenizer, recipe_vocab_size
from ..errors import UserError
from ..recipe.schema import Recipe


def held_out_corpus(recipe: Recipe, prefix: str | None = None) -> Corpus:
    """The recipe's, or that under a ``prefix`` which was made with the same tokenizer.

    Raises:
        UserError: where there is none, or its files are no good.
    """
    tokenizer, data = recipe_tokenizer(recipe), recipe.data
    prefix = prefix or data.validation or (NAME if NAME in data.sources else None)
    if prefix is None:
        raise UserError(
            "data.validation: the run has no held-out text; name some with --data PREFIX"
        )
    if prefix == NAME:
        prefix = python_stdlib(tokenizer)[1]
    vocab_size = recipe_vocab_size(recipe)
    check_corpus(prefix, tokenizer.identity, vocab_size)
    return Corpus(prefix, vocab_size)


class Haystack:
    """Text to hide things in: held-out documents one after another, over and over."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus, self.tokenizer = corpus, tokenizer

    def text(self, tokens: int, random: np.random.Generator) -> list[int]:
        """So many tokens from the beginning of a random document on, without those that end documents."""
        taken: list[int] = []
        for document in self._from(int(random.integers(len(self._corpus)))):
            if len(taken) >= tokens:
                return taken[:tokens]
            count = min(int(self._corpus.lengths[document]), tokens - len(taken) + 1)
            ids = self._corpus.read(document, 0, count)
            taken += ids[ids != self.tokenizer.end_of_document].tolist()
        return taken

    def _from(self, first: int) -> Iterator[int]:
        """Documents without end."""
        if not (self._corpus.lengths > 1).any():
            raise UserError(
                f"{self._corpus.prefix}: has no document of more than one token to make a text of"
            )
        while True:
            yield first
            first = (first + 1) % len(self._corpus)
