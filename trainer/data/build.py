"""Build a tokenized corpus from text files, folders, JSONL and Parquet."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..progress import track
from .corpus_files import CorpusRecord, corpus_files, write_record
from .text_files import NotTextError, TextChunk, find_chunks, group_chunks
from .tokenizer import Tokenizer


def build_corpus(
    sources: list[Path],
    tokenizer: Tokenizer,
    prefix: str,
    description: str = "Tokenizing",
    workers: int = 1,
    key: str = "text",
) -> CorpusRecord:
    """Tokenize every document of ``sources`` into the corpus ``prefix``, and return its record.

    A text file is one document. A folder is all its files, by name; files in it that are not UTF-8
    are left out and counted. Each line of a ``.jsonl`` and each row of a ``.parquet`` has a
    document under ``key``. The files are written beside their place and then renamed, the index
    last, so that a corpus is whole or not there. It is the same whatever the number of ``workers``.

    Args:
        sources: files and folders.
        tokenizer: for all of them.
        prefix: of the files to write.
        description: shown beside the progress bar.
        workers: processes that tokenize; 1 for this process.
        key: of the text in JSONL and Parquet.

    Raises:
        UserError: if the target exists, if a source does not, if a named file is not UTF-8, or if a
            .jsonl is not JSONL.
    """
    for target in corpus_files(prefix):
        if target.exists():
            raise UserError(f"{target}: already exists; remove it or choose another --out")
    chunks = [chunk for source in sources for chunk in find_chunks(source, key)]
    if not chunks:
        raise UserError(f"no text found in {', '.join(map(str, sources))}")

    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    building = f"{prefix}.building-{os.getpid()}"
    try:
        totals = _write_corpus(building, chunks, tokenizer, description, workers)
        if not totals.documents:
            raise UserError(f"no document found in {', '.join(map(str, sources))}")
        record = CorpusRecord(
            tokenizer=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            documents=totals.documents,
            tokens=totals.tokens,
            bytes=totals.text_bytes,
        )
        write_record(building, record)
        _rename_corpus(building, prefix)
    finally:
        for path in corpus_files(building):
            path.unlink(missing_ok=True)

    if totals.not_text:
        print(
            f"longspan: left out {len(totals.not_text)} files that are not UTF-8 text, "
            f"such as {totals.not_text[0]}",
            file=sys.stderr,
        )
    return record


class _Totals(NamedTuple):
    documents: int
    tokens: int
    text_bytes: int
    not_text: list[str]
    """Files that were left out."""


class _TokenizedGroup(NamedTuple):
    """The documents of a group of chunks."""

    ids: np.ndarray
    """Of all documents, one after another."""
    lengths: list[int]
    """Tokens of each document, with its end."""
    text_bytes: int
    disk_bytes: int
    """Of the chunks."""
    not_text: list[str]


def _write_corpus(
    prefix: str, chunks: list[TextChunk], tokenizer: Tokenizer, description: str, workers: int
) -> _Totals:
    """Write the .bin and .idx of ``prefix``."""
    from ..megatron_core import DType, IndexedDatasetBuilder

    files = corpus_files(prefix)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(files.bin), dtype=dtype)
    groups = list(group_chunks(chunks))
    disk_bytes = sum(chunk.num_bytes for chunk in chunks)

    documents = 0
    tokens = 0
    text_bytes = 0
    not_text: list[str] = []
    with (
        track(description, total=disk_bytes) as advance,
        _tokenizing(tokenizer, dtype, min(workers, len(groups))) as tokenize,
    ):
        for group in tokenize(groups):
            # What builder.add_item and end_document do for each document, for all of a group at
            # once.
            builder.data_file.write(group.ids.tobytes())
            builder.sequence_lengths.extend(group.lengths)
            first = len(builder.document_indices)
            builder.document_indices.extend(range(first, first + len(group.lengths)))

            documents += len(group.lengths)
            tokens += len(group.ids)
            text_bytes += group.text_bytes
            not_text += group.not_text
            advance(group.disk_bytes)
    builder.finalize(str(files.idx))
    return _Totals(documents, tokens, text_bytes, not_text)


def _rename_corpus(building: str, prefix: str) -> None:
    """Move a whole corpus to its place, the index last: without one there is no corpus."""
    source = corpus_files(building)
    target = corpus_files(prefix)
    source.bin.rename(target.bin)
    source.json.rename(target.json)
    source.idx.rename(target.idx)


TokenizeGroups = Callable[[Iterable[list[TextChunk]]], Iterator[_TokenizedGroup]]


@contextmanager
def _tokenizing(tokenizer: Tokenizer, dtype: type, workers: int) -> Iterator[TokenizeGroups]:
    """Yield a function that tokenizes groups of chunks, and gives the results in their order."""
    if workers == 1:
        _start_worker(tokenizer, dtype)
        yield lambda groups: map(_tokenize_group, groups)
        return
    # Spawned, not forked: the process may have threads of torch's by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(tokenizer, dtype)
    ) as pool:
        yield lambda groups: pool.map(_tokenize_group, groups)


class _Worker:
    """What every task of this process needs, sent to it once."""

    tokenizer: Tokenizer
    dtype: type


def _start_worker(tokenizer: Tokenizer, dtype: type) -> None:
    _Worker.tokenizer = tokenizer
    _Worker.dtype = dtype


def _tokenize_group(group: list[TextChunk]) -> _TokenizedGroup:
    tokenizer = _Worker.tokenizer
    documents: list[np.ndarray] = []
    text_bytes = 0
    not_text: list[str] = []
    for chunk in group:
        try:
            for text in chunk.documents():
                ids = [*tokenizer.encode(text), tokenizer.end_of_document]
                documents.append(np.array(ids, _Worker.dtype))
                text_bytes += len(text)
        except NotTextError as file:
            not_text.append(str(file))
    return _TokenizedGroup(
        ids=np.concatenate(documents) if documents else np.zeros(0, _Worker.dtype),
        lengths=[len(ids) for ids in documents],
        text_bytes=text_bytes,
        disk_bytes=sum(chunk.num_bytes for chunk in group),
        not_text=not_text,
    )
