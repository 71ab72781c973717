"""Text files, folders, JSONL and Parquet to a tokenized corpus."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..progress import track
from .corpus import Record, files, write_record
from .documents import NotTextError, Part, grouped, parts
from .tokenizer import Tokenizer


def build_corpus(
    sources: list[Path],
    tokenizer: Tokenizer,
    prefix: str,
    description: str = "Tokenizing",
    workers: int = 1,
    key: str = "text",
) -> Record:
    """Tokenize every document of ``sources`` to ``prefix`` and return the record.

    A text file is a document; a folder is all its files, by name (what is not UTF-8 is left out, and counted); each line of a
    ``.jsonl`` and each row of a ``.parquet`` has a document under ``key``. Written beside the target and renamed, the index
    last: a corpus is whole or not there, and the same whatever the number of ``workers``.

    Raises:
        UserError: the target exists, a source does not, a named file is not UTF-8, a .jsonl is not JSONL.
    """
    for target in files(prefix):
        if target.exists():
            raise UserError(f"{target}: exists already; remove it or choose another --out")
    found = [part for source in sources for part in parts(source, key)]
    if not found:
        raise UserError(f"no text found in {', '.join(map(str, sources))}")

    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    building = f"{prefix}.building-{os.getpid()}"
    data, index, record_file = files(building)
    documents, tokens, size, left_out = 0, 0, 0, []
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    try:
        builder = IndexedDatasetBuilder(str(data), dtype=dtype)
        groups = list(grouped(found))
        with (
            track(description, total=sum(part.size for part in found)) as advance,
            _tokenizing(tokenizer, dtype, min(workers, len(groups))) as run,
        ):
            for group in run(groups):
                builder.data_file.write(group.ids.tobytes())
                builder.sequence_lengths.extend(group.lengths)
                ends = range(
                    len(builder.document_indices),
                    len(builder.document_indices) + len(group.lengths),
                )
                builder.document_indices.extend(ends)
                documents, tokens = documents + len(group.lengths), tokens + len(group.ids)
                size, left_out = size + group.text_bytes, left_out + group.left_out
                advance(group.size)
        builder.finalize(str(index))
        if not documents:
            raise UserError(f"no document found in {', '.join(map(str, sources))}")
        record = Record(
            tokenizer.identity,
            tokenizer.vocab_size,
            tokenizer.end_of_document,
            documents,
            tokens,
            size,
        )
        write_record(building, record)
        for built, target in zip(
            (data, record_file, index), (files(prefix)[i] for i in (0, 2, 1)), strict=True
        ):
            built.rename(target)
    finally:
        for path in (data, index, record_file):
            path.unlink(missing_ok=True)
    if left_out:
        print(
            f"longspan: left out {len(left_out)} files that are not UTF-8 text, such as {left_out[0]}",
            file=sys.stderr,
        )
    return record


class _Tokenized(NamedTuple):
    """What came of some parts."""

    ids: np.ndarray
    lengths: list[int]
    """Of the documents, with their ends."""
    text_bytes: int
    size: int
    """Of the parts on the disk."""
    left_out: list[str]


@contextmanager
def _tokenizing(tokenizer: Tokenizer, dtype: type, workers: int) -> Iterator:
    """``run(groups of parts)`` gives what came of each, in their order."""
    if workers == 1:
        _Worker.tokenizer, _Worker.dtype = tokenizer, dtype
        yield lambda groups: map(_tokenize, groups)
        return
    # Not forked: the process may have threads of torch's by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(tokenizer, dtype)
    ) as pool:
        yield lambda groups: pool.map(_tokenize, groups)


class _Worker:
    """Of a process."""

    tokenizer: Tokenizer
    dtype: type


def _begin(tokenizer: Tokenizer, dtype: type) -> None:
    _Worker.tokenizer, _Worker.dtype = tokenizer, dtype


def _tokenize(group: list[Part]) -> _Tokenized:
    tokenizer, ids, lengths, text_bytes, left_out = _Worker.tokenizer, [], [], 0, []
    for part in group:
        try:
            for text in part.documents():
                own = np.array([*tokenizer.encode(text), tokenizer.end_of_document], _Worker.dtype)
                ids.append(own)
                lengths.append(len(own))
                text_bytes += len(text)
        except NotTextError as file:
            left_out.append(str(file))
    whole = np.concatenate(ids) if ids else np.zeros(0, _Worker.dtype)
    return _Tokenized(whole, lengths, text_bytes, sum(part.size for part in group), left_out)
