import math
from collections import Counter, defaultdict

import pytest
from longspan.trainer.data.build import build_corpus
from longspan.trainer.data.corpus import Corpus
from longspan.trainer.data.tokenizer import ByteTokenizer
from longspan.trainer.evaluation.ngram import order2_bits_per_token


def by_hand(training: list[bytes], held_out: list[bytes]) -> float:
    """Witten-Bell interpolation with dictionaries, one token at a time."""
    follow = defaultdict(Counter)
    for text in training:
        ids = [*text, 256]
        for i, token in enumerate(ids):
            for order in range(1, 3):
                if i >= order:
                    follow[tuple(ids[i - order : i])][token] += 1
    unigrams = Counter(
        token
        for context, counts in follow.items()
        if len(context) == 1
        for token in counts.elements()
    )

    def probability(context, token):
        if not context:
            return (unigrams[token] + 1) / (unigrams.total() + 257)
        counts = follow[context]
        shorter = probability(context[1:], token)
        if not counts:
            return shorter
        return (counts[token] + len(counts) * shorter) / (counts.total() + len(counts))

    bits = 0.0
    tokens = 0
    for text in held_out:
        ids = [*text, 256]
        for i in range(1, len(ids)):
            bits -= math.log2(probability(tuple(ids[max(0, i - 2) : i]), ids[i]))
            tokens += 1
    return bits / tokens


def test_parity_with_counting_by_hand(tmp_path):
    texts = {
        "train": [b"the cat sat on the mat", b"a", b"the dog sat", b"on and on and on"],
        "held": [b"the cat and the dog", b"xyz", b"q"],
    }
    for split, documents in texts.items():
        (tmp_path / split).mkdir()
        for i, text in enumerate(documents):
            (tmp_path / split / f"{i}.txt").write_bytes(text)
        build_corpus([tmp_path / split], ByteTokenizer(), str(tmp_path / f"{split}-corpus"))
    ours = order2_bits_per_token(
        [Corpus(str(tmp_path / "train-corpus"), 257)], Corpus(str(tmp_path / "held-corpus"), 257)
    )
    assert ours == pytest.approx(by_hand(texts["train"], texts["held"]), rel=1e-12)
