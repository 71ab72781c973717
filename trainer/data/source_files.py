"""What the files are that a corpus is built from, and which of them are no text.

A file is what its content says. Its name only tells what content cannot: that a file of JSON has
nothing but records, or that text is a table.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .compressed import DamagedDataError, open_decompressed
from .corpus_files import CorpusRecord, corpus_files
from .json_values import split_json_values

BOM = codecs.BOM_UTF8
_HEAD_BYTES = 1 << 16

_COMPRESSION_SUFFIXES = (".gz", ".zst", ".zstd")
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_TABLE_SUFFIXES = (".csv", ".tsv")

_PARQUET_MAGIC = b"PAR1"
_CORPUS_MAGIC = b"MMIDIDX"
_OTHER_UNICODE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_ARCHIVES = {
    rb"PK\x03\x04": "a ZIP archive",
    rb"BZh[1-9]1AY&SY": "compressed with bzip2",
    rb"\xfd7zXZ\x00": "compressed with xz",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a RAR archive",
}
"""By the first bytes."""


class Format(Enum):
    """How documents lie in a file."""

    TEXT = "one document"
    JSON_LINES = "an object a line"
    JSON_VALUES = "objects over several lines, or in an array"
    PARQUET = "a row group's rows"


class SourceFile(NamedTuple):
    """A file to read."""

    path: Path
    format: Format
    is_named: bool
    """Whether the user named the file itself, rather than a folder that it lies in."""


@dataclass(frozen=True)
class LeftOut:
    """Something that is not read: a file of a folder, or a document."""

    kind: str
    """What it is called in the plural."""
    place: str
    """The file, with the line in it."""


class NoSourceError(Exception):
    """A file that has no documents to read."""

    def __init__(self, kind: str, problem: str, fix: str):
        super().__init__(problem)
        self.kind = kind
        """What such files are called in the plural."""
        self.problem = problem
        self.fix = fix


NOT_UTF8 = "files that are not UTF-8 text"


def find_sources(source: Path, key: str) -> Iterator[SourceFile | LeftOut]:
    """Find the files of a source: itself, or all files in a folder, by name.

    Hidden files and Python's caches in a folder are passed over.

    Args:
        source: a file or a folder.
        key: of the text in JSON.

    Raises:
        UserError: if there is no such file or folder, or if a file that is named itself has no
            documents to read.
    """
    if source.is_file():
        try:
            yield SourceFile(source, _recognize(source, key, is_named=True), is_named=True)
        except NoSourceError as error:
            raise UserError(f"{source}: {error.problem}; {error.fix}") from None
    elif source.is_dir():
        for path in sorted(source.rglob("*")):
            if _is_visible_file(path, source):
                yield _source_in_folder(path, key)
    else:
        raise UserError(f"{source}: no such file or folder")


def _source_in_folder(path: Path, key: str) -> SourceFile | LeftOut:
    try:
        return SourceFile(path, _recognize(path, key, is_named=False), is_named=False)
    except NoSourceError as error:
        return LeftOut(error.kind, str(path))


def _is_visible_file(path: Path, folder: Path) -> bool:
    names = path.relative_to(folder).parts
    is_hidden = any(name.startswith(".") or name == "__pycache__" for name in names)
    return path.is_file() and not is_hidden


def _recognize(path: Path, key: str, is_named: bool) -> Format:
    """Tell the format of a file.

    Raises:
        NoSourceError: if it is none of them.
        UserError: if it cannot be read.
    """
    suffix = _suffix(path)
    try:
        head = _read_head(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    if head.startswith(_PARQUET_MAGIC):
        return Format.PARQUET
    _refuse_other_formats(path, suffix, head)
    json_format = _json_format(path, suffix, head, key, is_named)
    if json_format:
        return json_format
    _refuse_binary(head)
    return Format.TEXT


def _read_head(path: Path) -> bytes:
    """Return the first bytes of a file, at most as many as can be decompressed."""
    head = b""
    with open_decompressed(path) as stream, suppress(DamagedDataError):  # its reader reports it
        while block := stream.read1(_HEAD_BYTES - len(head)):
            head += block
    return head


def _suffix(path: Path) -> str:
    """Return the last suffix of a name, in lower case and without that of compression."""
    name = path.name.lower()
    for compression in _COMPRESSION_SUFFIXES:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _refuse_other_formats(path: Path, suffix: str, head: bytes) -> None:
    """Raise NoSourceError for what is known by its first bytes or its name."""
    if _is_of_corpus(path, head):
        fix = "name its prefix in data.sources, or name the text that it was built from"
        raise NoSourceError("files of tokenized corpora", "is part of a tokenized corpus", fix)
    for magic, what in _ARCHIVES.items():
        if re.match(magic, head):
            fix = "unpack it; files compressed with gzip (.gz) and Zstandard (.zst) are read"
            raise NoSourceError("archives and files of other compressions", f"is {what}", fix)
    if head.startswith(_OTHER_UNICODE):
        fix = "convert it: iconv -f UTF-16 -t UTF-8"
        raise NoSourceError(NOT_UTF8, "is UTF-16 or UTF-32, not UTF-8 text", fix)
    if suffix == ".parquet":
        raise UserError(f"{path}: not a Parquet file; replace it or remove it")
    if suffix in _TABLE_SUFFIXES:
        problem = "is a table (CSV or TSV), which is not read"
        raise NoSourceError("tables (CSV or TSV)", problem, _table_fix(suffix))


def _is_of_corpus(path: Path, head: bytes) -> bool:
    """Tell whether a file is one of a corpus of ours or of Megatron's."""
    if head.startswith(_CORPUS_MAGIC):
        return True
    files = corpus_files(str(path.with_suffix("")))
    if path not in (files.bin, files.json) or not files.idx.is_file():
        return False
    if path == files.json:
        return all(f'"{field}"'.encode() in head for field in CorpusRecord.__annotations__)
    with files.idx.open("rb") as index:
        return index.read(len(_CORPUS_MAGIC)) == _CORPUS_MAGIC


def _table_fix(suffix: str) -> str:
    """Return how a table becomes JSON lines."""
    arguments = ", delimiter='\\t'" if suffix == ".tsv" else ""
    return (
        'convert it to JSON lines: python -c "import csv, json, sys; '
        f'[print(json.dumps(row)) for row in csv.DictReader(sys.stdin{arguments})]" '
        f"< TABLE{suffix} > TABLE.jsonl"
    )


def _json_format(path: Path, suffix: str, head: bytes, key: str, is_named: bool) -> Format | None:
    """Return how the file has JSON records, or None if it has something else.

    A name like .jsonl is believed. Under any other name, the first record must be an object, and
    in a folder, where configurations and the like may lie as well, it must have the key.

    Raises:
        NoSourceError: for JSON in a folder that is not records with the key.
    """
    start = head.removeprefix(BOM).lstrip()
    is_lines = suffix in _JSON_LINES_SUFFIXES
    is_json = suffix == ".json"
    if is_lines or (is_json and not start):
        # A line of JSON lines is a whole value, so a bracket alone is not one.
        is_array = re.match(rb"[\[{]\s*\n|\[\s*\{", start)
        return Format.JSON_VALUES if is_array else Format.JSON_LINES

    if start.startswith(b"{") and isinstance(_first_line_value(path), dict):
        json_format = Format.JSON_LINES
    elif is_json or re.match(rb'\[\s*\{\s*"', start):
        json_format = Format.JSON_VALUES
    else:
        return None

    if is_named and is_json:
        return json_format
    record = _first_value(path)
    if isinstance(record, dict) and (is_named or isinstance(record.get(key), str)):
        return json_format
    if is_json or isinstance(record, dict):
        raise NoSourceError(f"JSON files without the key {key}", "has no such key", "")
    return None


def _first_line_value(path: Path) -> object:
    """Return the value of the first line that is not empty, or None if it is not JSON."""
    with open_decompressed(path) as stream, suppress(DamagedDataError):
        for line in stream:
            text = line.removeprefix(BOM).strip()
            if text:
                return _parsed(text)
    return None


def _first_value(path: Path) -> object:
    """Return the first value of a file, or None if it is not JSON."""
    with open_decompressed(path) as stream, suppress(DamagedDataError):
        for value in split_json_values(stream):
            return _parsed(value.text.removeprefix(BOM))
    return None


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _refuse_binary(head: bytes) -> None:
    """Raise NoSourceError for a file whose first bytes are no text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start})"
        raise NoSourceError(NOT_UTF8, problem, "leave it out or convert it") from None
    if b"\0" in head:
        problem = f"a binary file (byte {head.index(0)} is NUL)"
        raise NoSourceError("binary files", problem, "leave it out or convert it")
