"""Check that the files of a corpus fit one another and the recipe, without reading the tokens."""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import UserError
from .corpus_files import corpus_files, read_record

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}


class _Header(NamedTuple):
    dtype: np.dtype
    """Of the token ids in the .bin."""
    num_sequences: int
    num_edges: int
    """Of documents: one more than there are documents."""


def check_corpus(prefix: str, tokenizer: str, vocab_size: int) -> None:
    """Check a corpus in milliseconds, without torch.

    Args:
        prefix: of the corpus.
        tokenizer: identity of the recipe's tokenizer.
        vocab_size: ids that the model knows.

    Raises:
        UserError: if a file is missing, truncated or of another size than the index says, or if the
            corpus was made with another tokenizer or a larger vocabulary than the model's.
    """
    files = corpus_files(prefix)
    for path in (files.bin, files.idx):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; build it with "
                f"`longspan data build SOURCE... --out {prefix}`"
            )
    _check_data_fits_index(files.bin, files.idx)
    _check_record(prefix, tokenizer, vocab_size)


def _check_data_fits_index(data: Path, index: Path) -> None:
    with index.open("rb") as stream:
        header = _read_header(stream, index)
        sequence_lengths = np.fromfile(stream, np.int32, header.num_sequences)
        stream.seek(8 * header.num_sequences, 1)  # the byte offset of each sequence
        document_edges = np.fromfile(stream, np.int64, header.num_edges)

    edges_are_valid = (
        len(document_edges) > 0
        and document_edges[0] == 0
        and document_edges[-1] == header.num_sequences
        and (np.diff(document_edges) >= 0).all()
    )
    if not edges_are_valid or (sequence_lengths < 0).any():
        raise UserError(
            f"{index}: its documents do not fit its {header.num_sequences} sequences; "
            "build it again"
        )

    num_tokens = int(sequence_lengths.sum(dtype=np.int64))
    described_bytes = num_tokens * header.dtype.itemsize
    data_bytes = data.stat().st_size
    if data_bytes != described_bytes:
        raise UserError(
            f"{data}: is {data_bytes} bytes long, but {index.name} describes {described_bytes}; "
            "build it again"
        )
    if num_tokens == 0:
        raise UserError(f"{data}: holds no tokens")


def _read_header(stream: BinaryIO, index: Path) -> _Header:
    """Read the header of an index, and check the size of the file by it."""
    index_bytes = index.stat().st_size
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(
            f"{index}: not an index in Megatron's format, or cut short ({index_bytes} bytes)"
        )
    _, version, dtype_code, num_sequences, num_edges = _HEADER.unpack(header)
    if version != _VERSION or dtype_code not in _DTYPES:
        raise UserError(f"{index}: version {version} with dtype code {dtype_code} cannot be read")

    # A length (int32) and an offset (int64) of each sequence, and the edges of documents (int64).
    # A multimodal corpus adds the mode of each sequence (int8).
    expected_bytes = _HEADER.size + 12 * num_sequences + 8 * num_edges
    if index_bytes not in (expected_bytes, expected_bytes + num_sequences):
        raise UserError(
            f"{index}: is {index_bytes} bytes long, but its header asks for {expected_bytes}; "
            "build it again"
        )
    return _Header(np.dtype(_DTYPES[dtype_code]), num_sequences, num_edges)


def _check_record(prefix: str, tokenizer: str, vocab_size: int) -> None:
    record = read_record(prefix)
    if record is None:
        return
    data = corpus_files(prefix).bin
    if record.tokenizer != tokenizer:
        raise UserError(
            f"{data}: was made with tokenizer {record.tokenizer}, but data.tokenizer is {tokenizer}"
        )
    if record.vocab_size > vocab_size:
        raise UserError(
            f"{data}: its recorded vocabulary of {record.vocab_size} is larger than "
            f"model.vocab_size {vocab_size}; raise it"
        )
