"""Where the documents of a corpus come from: text files, JSONL and Parquet, in parts that can be read on their own."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

PART = 16 << 20
"""Bytes of a part, as nearly as documents allow."""


class NotTextError(Exception):
    """A file that was found in a folder is not UTF-8."""


@dataclass(frozen=True)
class Part:
    """Of a file the documents that begin in ``start .. stop``: bytes, or row groups of a Parquet file."""

    path: Path
    start: int
    stop: int
    size: int
    """Bytes on the disk."""
    named: bool
    """Whether the file was named itself rather than found in a folder."""
    key: str
    """Of the text in a line or row."""

    def documents(self) -> Iterator[bytes]:
        """UTF-8 texts.

        Raises:
            UserError: for a named file that is not UTF-8, and for what is not JSONL or has no text under the key.
            NotTextError: for another that is not UTF-8.
        """
        kind = self.path.suffix
        yield from (
            _lines(self) if kind == ".jsonl" else _rows(self) if kind == ".parquet" else _text(self)
        )


def parts(source: Path, key: str) -> Iterator[Part]:
    """Of a file, or of all in a folder by name, but for what is hidden or a cache of Python's."""
    if source.is_file():
        files = [source]
    elif source.is_dir():
        inside = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
        kept = (
            path
            for path in inside
            if not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        )
        files = [source / path for path in kept]
    else:
        raise UserError(f"{source}: no such file or folder")
    for path in files:
        size, named = path.stat().st_size, path == source
        if path.suffix == ".parquet":
            groups = _parquet(path).num_row_groups
            yield from (
                Part(path, group, group + 1, size // groups, named, key) for group in range(groups)
            )
        elif path.suffix == ".jsonl":
            for start in range(0, max(1, size), PART):
                stop = min(start + PART, size)
                yield Part(path, start, stop, stop - start, named, key)
        else:
            yield Part(path, 0, size, size, named, key)


def grouped(all_parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Small ones together."""
    group: list[Part] = []
    size = 0
    for part in all_parts:
        group.append(part)
        size += part.size
        if size >= PART:
            yield group
            group, size = [], 0
    if group:
        yield group


def _text(part: Part) -> Iterator[bytes]:
    text = part.path.read_bytes()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        if not part.named:
            raise NotTextError(str(part.path)) from None
        raise UserError(
            f"{part.path}: not UTF-8 text (byte {error.start}); leave it out or convert it"
        ) from None
    yield text


def _lines(part: Part) -> Iterator[bytes]:
    with part.path.open("rb") as stream:
        if part.start:  # a line belongs to the part that it begins in
            stream.seek(part.start - 1)
            stream.readline()
        number = 0
        while stream.tell() < part.stop and (line := stream.readline()):
            number += 1
            try:
                yield json.loads(line)[part.key].encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                number += _lines_before(part)
                reason = f"not a JSON object with a string under the key {part.key}"
                raise UserError(f"{part.path}:{number}: {reason}") from None


def _lines_before(part: Part) -> int:
    """Lines that begin before the part does."""
    with part.path.open("rb") as stream:
        ends, left, last = 0, part.start, b"\n"
        while left and (block := stream.read(min(left, 1 << 20))):
            ends, left, last = ends + block.count(b"\n"), left - len(block), block[-1:]
        return ends + (last != b"\n")


def _rows(part: Part) -> Iterator[bytes]:
    file = _parquet(part.path)
    if part.key not in file.schema_arrow.names:
        raise UserError(
            f"{part.path}: has no column {part.key}; its columns are {', '.join(file.schema_arrow.names)}"
        )
    for group in range(part.start, part.stop):
        for number, text in enumerate(
            file.read_row_group(group, columns=[part.key]).column(0).to_pylist()
        ):
            if not isinstance(text, str):
                raise UserError(
                    f"{part.path}: row {number} of row group {group} has no text in column {part.key}"
                )
            yield text.encode()


def _parquet(path: Path):
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install longspan[parquet]") from None
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None
