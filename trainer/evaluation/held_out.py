"""Held-out text to measure a run on."""

import numpy as np

from ..data.corpus import Corpus, check_corpus
from ..data.stdlib import NAME, python_stdlib
from ..data.tokenizer import Tokenizer, recipe_tokenizer, recipe_vocab_size
from ..errors import UserError
from ..recipe import Recipe

_PIECE = 256
"""Tokens of a piece at most."""


def held_out_corpus(recipe: Recipe, prefix: str | None = None) -> Corpus:
    """Of the last stage's data, or under a ``prefix`` that was made with the same tokenizer.

    Raises:
        UserError: where there is none, or its files are no good.
    """
    recipe = recipe.at(recipe.training.steps - 1)
    tokenizer, data = recipe_tokenizer(recipe), recipe.data
    prefix = prefix or data.validation or (NAME if NAME in data.sources else None)
    if prefix is None:
        raise UserError("data.validation: the run has no held-out text; name some with --data PREFIX")
    if prefix == NAME:
        prefix = python_stdlib(tokenizer)[1]
    vocab_size = recipe_vocab_size(recipe)
    check_corpus(prefix, tokenizer.identity, vocab_size)
    return Corpus(prefix, vocab_size)


class Haystack:
    """Text to hide things in: the lines of held-out documents, one document after another, over and over."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus, self.tokenizer = corpus, tokenizer

    def pieces(self, tokens: int, random: np.random.Generator) -> list[list[int]]:
        """Lines from a random document on, long ones in parts: as many as fit into so many ``tokens``, as ids."""
        taken, room, document = [], tokens, int(random.integers(len(self._corpus)))
        while room > 0:
            for piece in self._lines(document, room):
                if len(piece) > room:
                    return taken
                taken.append(piece)
                room -= len(piece)
            document = (document + 1) % len(self._corpus)
        return taken

    def _lines(self, document: int, tokens: int) -> list[list[int]]:
        """Of the beginning of a document: what so many tokens may take, and a bit more."""
        ids = self._corpus.read(document, 0, min(int(self._corpus.lengths[document]), tokens + _PIECE))
        if ids[-1] == self.tokenizer.end_of_document:
            ids = ids[:-1]
        lines = self.tokenizer.decode(ids.tolist()).splitlines(keepends=True)
        encoded = [self.tokenizer.encode(line.encode()) for line in lines]
        return [line[start : start + _PIECE] for line in encoded for start in range(0, len(line), _PIECE)]
