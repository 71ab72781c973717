"""Documents of a tokenized corpus, read from disk."""

from functools import cached_property

import numpy as np

from ..errors import UserError
from .corpus_files import read_record


class Corpus:
    """The documents of the corpus with this ``prefix`` that hold tokens.

    Args:
        prefix: of files that :func:`~.corpus_check.check_corpus` has found to be good.
        vocab_size: bounds the ids that may be read.
    """

    def __init__(self, prefix: str, vocab_size: int):
        from ..megatron_core import IndexedDataset

        self.prefix = prefix
        self.vocab_size = vocab_size
        self.record = read_record(prefix)
        self._dataset = IndexedDataset(prefix)

        index = self._dataset.index
        self._dtype = np.dtype(index.dtype)
        # A document is one sequence or several; it ends at the edge of a sequence.
        sequence_edges = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
        document_edges = sequence_edges[index.document_indices]
        has_tokens = np.diff(document_edges) > 0
        self.starts: np.ndarray = document_edges[:-1][has_tokens]
        """Where each document starts in the .bin, in tokens."""
        self.lengths: np.ndarray = np.diff(document_edges)[has_tokens]
        """Tokens of each document, with the one that ends it."""

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """Read the ids ``start .. start + count`` of a document. Returns int64 ``[count]``.

        Raises:
            UserError: if an id is outside the vocabulary, with file and offset.
        """
        first_token = int(self.starts[document]) + start
        offset = first_token * self._dtype.itemsize
        ids = np.asarray(self._dataset.bin_reader.read(self._dtype, count, offset), np.int64)
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if outside.size:
            place = outside[0]
            raise UserError(
                f"{self.prefix}.bin: token id {ids[place]} "
                f"at byte offset {offset + place * self._dtype.itemsize} "
                f"(token {first_token + place}) is outside the vocabulary of {self.vocab_size}; "
                "build it with the model's tokenizer"
            )
        return ids

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text per token; None for a corpus without a record."""
        return self.record.bytes / self.record.tokens if self.record else None
