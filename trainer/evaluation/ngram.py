"""An order-2 byte model: what counting alone reaches on a corpus, for a trained model to be measured against."""

import numpy as np

from ..data.corpus import Corpus

_SYMBOLS = 257  # bytes and end of document


def order2_bits_per_token(training: list[Corpus], held_out: Corpus) -> float:
    """Mean bits of the held-out tokens, given the two before them, under counts of the whole training data.

    Interpolated with orders 1 and 0 by Witten and Bell's rule. The first token of a document, which no model here
    predicts, is left out; its second is given the one before it.
    """
    counts3 = np.zeros(_SYMBOLS**3, np.int64)
    counts2_first = np.zeros(
        _SYMBOLS**2, np.int64
    )  # pairs at the start of a document, which no triple holds
    for corpus in training:
        for document in range(len(corpus)):
            ids = corpus.read(document, 0, int(corpus.lengths[document]))
            np.add.at(counts3, _code(ids, 3), 1)
            if len(ids) > 1:
                counts2_first[_code(ids[:2], 2)] += 1
    counts3 = counts3.reshape(_SYMBOLS, _SYMBOLS, _SYMBOLS)
    counts2 = counts3.sum(0) + counts2_first.reshape(_SYMBOLS, _SYMBOLS)
    counts1 = counts2.sum(0)
    order0 = (counts1 + 1) / (counts1.sum() + _SYMBOLS)

    bits, tokens = 0.0, 0
    for document in range(len(held_out)):
        ids = held_out.read(document, 0, int(held_out.lengths[document]))
        if len(ids) > 1:
            order1 = _witten_bell(counts2[ids[:1]], order0)
            bits -= np.log2(order1[0, ids[1]])
            tokens += len(ids) - 1
        for start in range(
            0, len(ids) - 2, 4096
        ):  # a row of 257 probabilities per token: not all at once
            first, second, third = (
                ids[start + i : min(start + 4096, len(ids) - 2) + i] for i in range(3)
            )
            order2 = _witten_bell(counts3[first, second], _witten_bell(counts2[second], order0))
            bits -= np.log2(order2[np.arange(len(third)), third]).sum()
    return float(bits / tokens)


def _witten_bell(counts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """``(c + n(types) * p_shorter) / (sum c + n(types))`` for each row of counts; the shorter model where a row is empty."""
    types = (counts > 0).sum(-1, keepdims=True)
    total = counts.sum(-1, keepdims=True) + types
    return np.where(total > 0, (counts + types * shorter) / np.maximum(total, 1), shorter)


def _code(ids: np.ndarray, order: int) -> np.ndarray:
    """Runs of ``order`` ids, each as one number."""
    stop = len(ids) - order + 1
    return sum(ids[i : max(0, stop) + i] * _SYMBOLS ** (order - 1 - i) for i in range(order))
