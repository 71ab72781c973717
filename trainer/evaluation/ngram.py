"""An order-2 byte model: what counting alone reaches on a corpus, to compare a model with."""

from collections.abc import Iterator

import numpy as np

from ..data.corpus import Corpus

_SYMBOLS = 257  # bytes and end of document
_TOKENS_AT_ONCE = 4096  # each needs a row of 257 probabilities


def order2_bits_per_token(training: list[Corpus], held_out: Corpus) -> float:
    """Return the mean bits of the held-out tokens, given the two before them.

    Probabilities come from counts of the whole training data, interpolated with orders 1 and 0 by
    Witten and Bell's rule. The first token of a document, which no model here predicts, is left
    out; its second is given the one before it.
    """
    counts3, first_pairs = _count(training)
    # Every pair but the first of a document ends a triple.
    counts2 = counts3.sum(0) + first_pairs
    counts1 = counts2.sum(0)
    order0 = (counts1 + 1) / (counts1.sum() + _SYMBOLS)

    bits = 0.0
    num_tokens = 0
    for ids in _documents(held_out):
        if len(ids) > 1:
            order1 = _witten_bell(counts2[ids[:1]], order0)
            bits -= np.log2(order1[0, ids[1]])
            num_tokens += len(ids) - 1
        for start in range(0, len(ids) - 2, _TOKENS_AT_ONCE):
            stop = min(start + _TOKENS_AT_ONCE, len(ids) - 2)
            first = ids[start:stop]
            second = ids[start + 1 : stop + 1]
            third = ids[start + 2 : stop + 2]
            order1 = _witten_bell(counts2[second], order0)
            order2 = _witten_bell(counts3[first, second], order1)
            bits -= np.log2(order2[np.arange(len(third)), third]).sum()
    return float(bits / num_tokens)


def _count(corpora: list[Corpus]) -> tuple[np.ndarray, np.ndarray]:
    """Count triples of ids in a row, and the pairs at the start of documents.

    Returns:
        int64 ``[symbols, symbols, symbols]`` and ``[symbols, symbols]``.
    """
    triples = np.zeros(_SYMBOLS**3, np.int64)
    first_pairs = np.zeros((_SYMBOLS, _SYMBOLS), np.int64)
    for corpus in corpora:
        for ids in _documents(corpus):
            codes = (ids[:-2] * _SYMBOLS + ids[1:-1]) * _SYMBOLS + ids[2:]
            np.add.at(triples, codes, 1)
            if len(ids) > 1:
                first_pairs[ids[0], ids[1]] += 1
    return triples.reshape(_SYMBOLS, _SYMBOLS, _SYMBOLS), first_pairs


def _documents(corpus: Corpus) -> Iterator[np.ndarray]:
    """Yield the ids of each document."""
    for document in range(len(corpus)):
        yield corpus.read(document, 0, int(corpus.lengths[document]))


def _witten_bell(counts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Interpolate counts with the probabilities of a shorter context.

    A row of counts gives ``(c + n(types) * p_shorter) / (sum c + n(types))``; an empty row gives
    the probabilities of the shorter context.
    """
    types = (counts > 0).sum(-1, keepdims=True)
    total = counts.sum(-1, keepdims=True) + types
    return np.where(total > 0, (counts + types * shorter) / np.maximum(total, 1), shorter)
