"""The texts that a corpus is built from, in chunks that can be read independently.

They lie in text files, JSONL and Parquet.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

CHUNK_BYTES = 16 << 20
"""Size of a chunk, as nearly as the documents allow."""


class NotTextError(Exception):
    """A file that was found in a folder is not UTF-8."""


@dataclass(frozen=True)
class TextChunk:
    """The documents of a file that begin in ``start .. stop``: bytes, or row groups of Parquet."""

    path: Path
    start: int
    stop: int
    num_bytes: int
    """On disk."""
    is_named: bool
    """Whether the user named the file itself, rather than a folder that it lies in."""
    key: str
    """The key or column that holds the text, in JSONL and Parquet."""

    def documents(self) -> Iterator[bytes]:
        """Read the documents, as UTF-8.

        Raises:
            UserError: if a named file is not UTF-8, if a line is not JSON, or if a line or row has
            no
                text under the key.
            NotTextError: if a file that was found in a folder is not UTF-8.
        """
        read = _READERS.get(self.path.suffix, _read_text)
        return read(self)


def find_chunks(source: Path, key: str) -> Iterator[TextChunk]:
    """Find the chunks of a file, or of all files in a folder, by name.

    Hidden files and Python's caches are left out of a folder.

    Raises:
        UserError: if there is no such file or folder, or if a Parquet file cannot be read.
    """
    if source.is_file():
        paths = [source]
    elif source.is_dir():
        paths = [path for path in sorted(source.rglob("*")) if _is_wanted(path, source)]
    else:
        raise UserError(f"{source}: no such file or folder")
    for path in paths:
        yield from _split_file(path, key, is_named=path == source)


def _is_wanted(path: Path, folder: Path) -> bool:
    names = path.relative_to(folder).parts
    is_hidden = any(name.startswith(".") or name == "__pycache__" for name in names)
    return path.is_file() and not is_hidden


def _split_file(path: Path, key: str, is_named: bool) -> Iterator[TextChunk]:
    num_bytes = path.stat().st_size
    if path.suffix == ".parquet":
        num_groups = _open_parquet(path).num_row_groups
        for group in range(num_groups):
            yield TextChunk(path, group, group + 1, num_bytes // num_groups, is_named, key)
    elif path.suffix == ".jsonl":
        for start in range(0, max(1, num_bytes), CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, num_bytes)
            yield TextChunk(path, start, stop, stop - start, is_named, key)
    else:
        yield TextChunk(path, 0, num_bytes, num_bytes, is_named, key)


def group_chunks(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Put small chunks together, so that each group is worth a task of a worker process."""
    group: list[TextChunk] = []
    num_bytes = 0
    for chunk in chunks:
        group.append(chunk)
        num_bytes += chunk.num_bytes
        if num_bytes >= CHUNK_BYTES:
            yield group
            group = []
            num_bytes = 0
    if group:
        yield group


def _read_text(chunk: TextChunk) -> Iterator[bytes]:
    text = chunk.path.read_bytes()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        if not chunk.is_named:
            raise NotTextError(str(chunk.path)) from None
        raise UserError(
            f"{chunk.path}: not UTF-8 text (byte {error.start}); leave it out or convert it"
        ) from None
    yield text


def _read_jsonl(chunk: TextChunk) -> Iterator[bytes]:
    with chunk.path.open("rb") as stream:
        if chunk.start:
            # A line belongs to the chunk that it begins in: skip the rest of one that began before.
            stream.seek(chunk.start - 1)
            stream.readline()
        line_number = 0  # in this chunk
        while stream.tell() < chunk.stop and (line := stream.readline()):
            line_number += 1
            try:
                yield json.loads(line)[chunk.key].encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                number = _count_lines_before(chunk) + line_number
                reason = f"not a JSON object with a string under the key {chunk.key}"
                raise UserError(f"{chunk.path}:{number}: {reason}") from None


def _count_lines_before(chunk: TextChunk) -> int:
    """Count the lines of the file that begin before the chunk does."""
    with chunk.path.open("rb") as stream:
        line_ends = 0
        remaining = chunk.start
        last_byte = b"\n"
        while remaining and (block := stream.read(min(remaining, 1 << 20))):
            line_ends += block.count(b"\n")
            remaining -= len(block)
            last_byte = block[-1:]
        return line_ends + (last_byte != b"\n")


def _read_parquet(chunk: TextChunk) -> Iterator[bytes]:
    file = _open_parquet(chunk.path)
    columns = file.schema_arrow.names
    if chunk.key not in columns:
        raise UserError(
            f"{chunk.path}: has no column {chunk.key}; its columns are {', '.join(columns)}"
        )
    for group in range(chunk.start, chunk.stop):
        texts = file.read_row_group(group, columns=[chunk.key]).column(0).to_pylist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(
                    f"{chunk.path}: row {row} of row group {group} "
                    f"has no text in column {chunk.key}"
                )
            yield text.encode()


def _open_parquet(path: Path):
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install longspan[parquet]") from None
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
"""By suffix; all else is read as one text."""
