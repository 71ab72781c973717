"""Build a tokenized corpus from files of text, JSON and Parquet, and folders of them."""

import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import UserError
from ..progress import track
from .corpus_files import CorpusRecord, corpus_files, write_record
from .source_files import NOT_UTF8, LeftOut
from .text_files import (
    BadDocumentError,
    Document,
    NotUTF8Error,
    TextChunk,
    find_chunks,
    group_chunks,
)
from .tokenizer import SpecialTokenError, Tokenizer

EMPTY = "empty documents"
_LONGEST_SEQUENCE = np.iinfo(np.int32).max
_LONG_PIECE = 64 << 20
"""Characters that are not encoded together without a word."""
_MEMORY_PER_BYTE = 120
"""Bytes that the tokenizers library takes for each byte of a text."""
_LISTED = 10
"""Bad documents that are listed; a file beside the corpus lists them all."""


def build_corpus(
    sources: list[Path],
    tokenizer: Tokenizer,
    prefix: str,
    description: str = "Tokenizing",
    workers: int = 1,
    key: str = "text",
    skip_bad: bool = False,
) -> CorpusRecord:
    """Tokenize every document of ``sources`` into the corpus ``prefix``, and return its record.

    :mod:`.source_files` says what the documents of a file are. A folder is all its files, by name;
    those that are no text are left out, and so are empty documents. What is left out is counted
    on stderr. The files are written beside their place and then renamed, the index last, so that a
    corpus is whole or not there. It is the same whatever the number of ``workers``.

    Args:
        sources: files and folders.
        tokenizer: for all of them.
        prefix: of the files to write.
        description: shown beside the progress bar.
        workers: processes that tokenize; 1 for this process.
        key: of the text in JSON and Parquet.
        skip_bad: leave out documents that cannot be read, and list them in ``PREFIX.skipped.txt``,
            instead of an error for the first one.

    Raises:
        UserError: if the target exists or cannot be written, if a source does not exist or has no
            documents, or if one cannot be read.
    """
    for target in corpus_files(prefix):
        if target.exists():
            raise UserError(f"{target}: already exists; remove it or choose another --out")
    chunks: list[TextChunk] = []
    left_out: list[LeftOut] = []
    for source in sources:
        for found in find_chunks(source, key):
            if isinstance(found, LeftOut):
                left_out.append(found)
            else:
                chunks.append(found)
    if not chunks:
        names = ", ".join(map(str, sources))
        raise UserError(f"no text found in {names}{_and_left_out(left_out)}")

    building = f"{prefix}.building-{os.getpid()}"
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        totals = _write_corpus(
            building, chunks, _Tokenizing(tokenizer, skip_bad, building), description, workers
        )
        left_out += totals.left_out
        if not totals.documents:
            names = ", ".join(map(str, sources))
            raise UserError(f"no document found in {names}{_and_left_out(left_out)}")
        record = CorpusRecord(
            tokenizer=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            documents=totals.documents,
            tokens=totals.tokens,
            bytes=totals.text_bytes,
            reads_special_tokens=tokenizer.reads_special_tokens,
        )
        write_record(building, record)
        _rename_corpus(building, prefix)
        _report(prefix, left_out, totals.skipped)
    except OSError as error:
        raise UserError(f"{prefix}: cannot be written: {error}") from None
    finally:
        for path in Path(prefix).parent.glob(f"{Path(building).name}*"):
            path.unlink(missing_ok=True)
    return record


def _and_left_out(left_out: list[LeftOut]) -> str:
    return f"; left out {_counted(left_out)}" if left_out else ""


def _counted(left_out: list[LeftOut]) -> str:
    """Return what was left out in words: how many of each kind, and an example."""
    counts = Counter(item.kind for item in left_out)
    examples = {item.kind: item.place for item in reversed(left_out)}
    return "; ".join(
        f"{count:,} {kind}, such as {examples[kind]}" for kind, count in counts.items()
    )


def _report(prefix: str, left_out: list[LeftOut], skipped: list[str]) -> None:
    """Say what is not in the corpus, and list bad documents."""
    if left_out:
        print(f"longspan: left out {_counted(left_out)}", file=sys.stderr)
    if skipped:
        listing = Path(f"{prefix}.skipped.txt")
        listing.write_text("".join(f"{line}\n" for line in skipped))
        lines = [f"longspan: skipped {len(skipped):,} that cannot be read, listed in {listing}:"]
        lines += skipped[:_LISTED]
        if len(skipped) > _LISTED:
            lines.append("...")
        print("\n  ".join(lines), file=sys.stderr)


@dataclass
class _Totals:
    """What was written, of a group of chunks or of all."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of each document, with its end."""
    text_bytes: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Where each bad document is, and why it cannot be read."""

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def add(self, other: "_Totals") -> None:
        self.lengths += other.lengths
        self.text_bytes += other.text_bytes
        self.left_out += other.left_out
        self.skipped += other.skipped


def _write_corpus(
    prefix: str,
    chunks: list[TextChunk],
    tokenizing: "_Tokenizing",
    description: str,
    workers: int,
) -> _Totals:
    """Write the .bin and .idx of ``prefix``."""
    from ..megatron_core import IndexedDatasetBuilder

    files = corpus_files(prefix)
    builder = IndexedDatasetBuilder(str(files.bin), dtype=tokenizing.dtype)
    groups = list(group_chunks(chunks))
    disk_bytes = sum(chunk.num_bytes for chunk in chunks)

    totals = _Totals()
    with (
        builder.data_file,
        track(description, total=disk_bytes) as advance,
        _tokenized(tokenizing, groups, builder.data_file, workers) as results,
    ):
        for group, result in zip(groups, results, strict=True):
            totals.add(result)
            advance(sum(chunk.num_bytes for chunk in group))
    for length in totals.lengths:
        # A document is several sequences if the index could not hold its length.
        num_full, rest = divmod(length, _LONGEST_SEQUENCE)
        builder.sequence_lengths += [_LONGEST_SEQUENCE] * num_full + [rest] * (rest > 0)
        builder.end_document()
    builder.finalize(str(files.idx))
    return totals


def _rename_corpus(building: str, prefix: str) -> None:
    """Move a whole corpus to its place, the index last: without one there is no corpus."""
    source = corpus_files(building)
    target = corpus_files(prefix)
    source.bin.rename(target.bin)
    source.json.rename(target.json)
    source.idx.rename(target.idx)


@contextmanager
def _tokenized(
    tokenizing: "_Tokenizing", groups: list[list[TextChunk]], out: BinaryIO, workers: int
) -> Iterator[Iterable[_Totals]]:
    """Yield what was written to ``out`` of each group, in their order."""
    workers = min(workers, len(groups))
    if workers == 1:
        yield (tokenizing.write(group, out) for group in groups)
        return
    # Spawned, not forked: the process may have threads of torch's by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(tokenizing,)
    ) as pool:
        yield _joined(pool.map(_write_part, range(len(groups)), groups), out)


def _joined(parts: Iterator["_Part"], out: BinaryIO) -> Iterator[_Totals]:
    """Append the files that worker processes have written to one."""
    try:
        for part in parts:
            with part.path.open("rb") as stream:
                shutil.copyfileobj(stream, out, 1 << 20)
            part.path.unlink()
            yield part.totals
    except BrokenProcessPool:
        raise UserError(
            "--workers: a process that tokenizes was killed, most likely because memory ran out; "
            "use fewer"
        ) from None


class _Part(NamedTuple):
    """The tokens of a group of chunks, written to a file: a document may be larger than memory."""

    path: Path
    totals: _Totals


class _Worker:
    """What every task of this process needs, sent to it once."""

    tokenizing: "_Tokenizing"


def _start_worker(tokenizing: "_Tokenizing") -> None:
    _Worker.tokenizing = tokenizing


def _write_part(number: int, group: list[TextChunk]) -> _Part:
    path = Path(f"{_Worker.tokenizing.prefix}.part-{number}")
    with path.open("wb") as out:
        return _Part(path, _Worker.tokenizing.write(group, out))


class _Tokenizing:
    """How documents are tokenized and written."""

    def __init__(self, tokenizer: Tokenizer, skip_bad: bool, prefix: str):
        from ..megatron_core import DType

        self.tokenizer = tokenizer
        self.skip_bad = skip_bad
        self.prefix = prefix
        """Of the files that are written."""
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)

    def write(self, group: list[TextChunk], out: BinaryIO) -> _Totals:
        """Write the tokens of the documents of a group, one after another."""
        totals = _Totals()
        for chunk in group:
            for document in chunk.documents():
                start = out.tell()
                try:
                    if isinstance(document, BadDocumentError):
                        raise document
                    self._write_document(document, out, totals)
                except BadDocumentError as error:
                    out.seek(start)
                    out.truncate()
                    if isinstance(error, NotUTF8Error) and not chunk.source.is_named:
                        totals.left_out.append(LeftOut(NOT_UTF8, error.place))
                    elif self.skip_bad:
                        totals.skipped.append(f"{error.place}: {error.cause}")
                    else:
                        raise UserError(f"{error.place}: {error.cause}; {error.fix}") from None
        return totals

    def _write_document(self, document: Document, out: BinaryIO, totals: _Totals) -> None:
        """Write the tokens of a document and its end, and count it, unless it has none."""
        num_tokens = 0
        num_bytes = 0

        def counted_blocks() -> Iterator[str]:
            nonlocal num_bytes
            for block in document.blocks:
                num_bytes += len(block.encode())
                yield block

        for piece in self.tokenizer.pieces(counted_blocks()):
            if len(piece) >= _LONG_PIECE:
                self._announce(piece, document.place())
            try:
                ids = self.tokenizer.encode(piece.encode())
            except SpecialTokenError as error:
                raise BadDocumentError(
                    document.place(),
                    f"spells the special token {error}, which the tokenizer's model takes for the "
                    "token itself; build with --parse-special if it is meant",
                ) from None
            out.write(np.array(ids, self.dtype).tobytes())
            num_tokens += len(ids)

        if num_tokens == 0:
            totals.left_out.append(LeftOut(EMPTY, document.place()))
            return
        out.write(np.array([self.tokenizer.end_of_document], self.dtype).tobytes())
        totals.lengths.append(num_tokens + 1)
        totals.text_bytes += num_bytes

    def _announce(self, piece: str, place: str) -> None:
        """Say why a long text is encoded whole, which memory may not suffice for."""
        reason = self.tokenizer.cut_obstacle or "it has nowhere two words with a space between"
        gib = len(piece) * _MEMORY_PER_BYTE / 2**30
        print(
            f"longspan: {place}: {len(piece):,} characters are encoded whole, for some "
            f"{gib:,.0f} GiB of memory: {reason}",
            file=sys.stderr,
        )
