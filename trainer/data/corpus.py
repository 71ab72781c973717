"""A tokenized corpus on disk: Megatron's ``PREFIX.bin`` and ``PREFIX.idx``, and our record ``PREFIX.json`` of what is in it.

A corpus that Megatron made has no record and works as well: its ids are then checked as they are read.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import UserError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}


@dataclass(frozen=True)
class Record:
    """What was built, and with which tokenizer."""

    tokenizer: str
    vocab_size: int
    end_of_document: int
    documents: int
    tokens: int
    bytes: int


def files(prefix: str) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def write_record(prefix: str, record: Record) -> None:
    files(prefix)[2].write_text(json.dumps(asdict(record), indent=1) + "\n")


def read_record(prefix: str) -> Record | None:
    path = files(prefix)[2]
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a record of this corpus ({error}); build the corpus again"
        ) from None


def fingerprint(prefix: str) -> str:
    """Tells one corpus from another: SHA-256 of the index, and of 64 samples of the data, which may be too large to read."""
    data, index, _ = files(prefix)
    with index.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    size = data.stat().st_size
    with data.open("rb") as stream:
        for part in range(64):
            stream.seek(size * part // 64)
            digest.update(stream.read(4096))
    return f"{digest.hexdigest()}-{size}"


def check_corpus(prefix: str, tokenizer: str, vocab_size: int) -> None:
    """Refuse what can be seen to be wrong without reading the tokens: in milliseconds, without torch.

    Raises:
        UserError: a file is missing, truncated or of another size than the index says, or the corpus was made with
            another tokenizer or a larger vocabulary than the model's.
    """
    data, index, _ = files(prefix)
    for path in (data, index):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; build it with `longspan data build SOURCE... --out {prefix}`"
            )
    size = index.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != b"MMIDIDX\0\0":
            raise UserError(
                f"{index}: not an index of Megatron's format, or cut short ({size} bytes)"
            )
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise UserError(
                f"{index}: version {version} with dtype code {code} is not one that can be read"
            )
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size not in (
            expected,
            expected + sequences,
        ):  # the rest are the modes of a multimodal corpus
            raise UserError(
                f"{index}: is {size} bytes long, but its header asks for {expected}; build it again"
            )
        lengths = np.fromfile(stream, np.int32, sequences)
        stream.seek(8 * sequences, 1)
        edges = np.fromfile(stream, np.int64, documents)
    if (
        not documents
        or edges[0] != 0
        or edges[-1] != sequences
        or (np.diff(edges) < 0).any()
        or (lengths < 0).any()
    ):
        raise UserError(
            f"{index}: its documents do not fit its {sequences} sequences; build it again"
        )
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(_DTYPES[code]).itemsize
    if data.stat().st_size != expected:
        raise UserError(
            f"{data}: is {data.stat().st_size} bytes long, but {index.name} describes {expected}; build it again"
        )
    if not lengths.any():
        raise UserError(f"{data}: holds no tokens")
    record = read_record(prefix)
    if record is None:
        return
    if record.tokenizer != tokenizer:
        raise UserError(
            f"{data}: was made with tokenizer {record.tokenizer}, but data.tokenizer is {tokenizer}"
        )
    if record.vocab_size > vocab_size:
        raise UserError(
            f"{data}: its recorded vocabulary of {record.vocab_size} is larger than model.vocab_size {vocab_size}; raise it"
        )


class Corpus:
    """Documents of a prefix. ``vocab_size`` bounds the ids that may be read."""

    def __init__(self, prefix: str, vocab_size: int):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.prefix, self.vocab_size = prefix, vocab_size
        self.record = read_record(prefix)
        self._dataset = IndexedDataset(prefix)
        index = self._dataset.index
        self._dtype = np.dtype(index.dtype)
        lengths = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
        bounds = lengths[index.document_indices]
        filled = np.diff(bounds) > 0
        self.starts: np.ndarray = bounds[:-1][filled]
        """Of the documents that hold tokens: where they start in the .bin, in tokens."""
        self.lengths: np.ndarray = np.diff(bounds)[filled]

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """int64 ids ``start .. start + count`` of a document.

        Raises:
            UserError: an id outside the vocabulary, with file and offset.
        """
        at = int(self.starts[document]) + start
        offset = at * self._dtype.itemsize
        ids = np.asarray(self._dataset.bin_reader.read(self._dtype, count, offset), np.int64)
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if wrong.size:
            raise UserError(
                f"{self.prefix}.bin: token id {ids[wrong[0]]} at byte offset {offset + wrong[0] * self._dtype.itemsize} "
                f"(token {at + wrong[0]}) is outside the vocabulary of {self.vocab_size}; build it with the model's tokenizer"
            )
        return ids

    @cached_property
    def bytes_per_token(self) -> float | None:
        return self.record.bytes / self.record.tokens if self.record else None
