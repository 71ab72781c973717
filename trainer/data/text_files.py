"""The documents of a corpus's source files, in chunks that can be read independently."""

import codecs
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .compressed import DamagedDataError, is_compressed, open_decompressed
from .json_values import split_json_values
from .source_files import BOM, Format, LeftOut, SourceFile, find_sources

CHUNK_BYTES = 16 << 20
"""Size of a chunk, as nearly as the documents allow."""
_BLOCK_BYTES = 1 << 20
_ROWS = 256
"""Rows of Parquet that are in memory at a time."""


class BadDocumentError(Exception):
    """A document that cannot be read: where it is, and why."""

    def __init__(self, place: str, cause: str):
        super().__init__(place, cause)
        self.place = place
        """The file, with the line or row."""
        self.cause = cause

    fix = "correct it, or skip what cannot be read with --skip-bad"


class NotUTF8Error(BadDocumentError):
    """A file of text that is not UTF-8."""

    fix = "leave it out or convert it"


class Document(NamedTuple):
    """A text, and where it is."""

    place: Callable[[], str]
    """Returns the file, with the line or row; only while this is the newest document."""
    blocks: Iterable[str]
    """The text in parts, cut anywhere. Raises BadDocumentError where it cannot be read further."""


DocumentOrError = Document | BadDocumentError


@dataclass(frozen=True)
class TextChunk:
    """The documents of a file that begin in ``start .. stop``: bytes, or row groups of Parquet."""

    source: SourceFile
    start: int
    stop: int
    num_bytes: int
    """On disk."""
    key: str
    """The key or column that holds the text, in JSON and Parquet."""

    @property
    def path(self) -> Path:
        return self.source.path

    def documents(self) -> Iterator[DocumentOrError]:
        """Read the documents, and an error in the place of each that cannot be read.

        Raises:
            UserError: if nothing can be read at all.
        """
        try:
            yield from _READERS[self.source.format](self)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error}") from None


def find_chunks(source: Path, key: str) -> Iterator[TextChunk | LeftOut]:
    """Find the chunks of a file, or of all files in a folder, and the files that are left out.

    Raises:
        UserError: see :func:`.source_files.find_sources`; or a Parquet file cannot be read.
    """
    for found in find_sources(source, key):
        if isinstance(found, LeftOut):
            yield found
        else:
            yield from _split_file(found, key)


def _split_file(source: SourceFile, key: str) -> Iterator[TextChunk]:
    num_bytes = source.path.stat().st_size
    if is_compressed(source.path) or source.format in (Format.TEXT, Format.JSON_VALUES):
        yield TextChunk(source, 0, num_bytes, num_bytes, key)
    elif source.format is Format.PARQUET:
        num_groups = _open_parquet(source.path, source.path).num_row_groups
        for group in range(num_groups):
            yield TextChunk(source, group, group + 1, num_bytes // num_groups, key)
    else:
        for start in range(0, max(1, num_bytes), CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, num_bytes)
            yield TextChunk(source, start, stop, stop - start, key)


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


def _read_text(chunk: TextChunk) -> Iterator[DocumentOrError]:
    yield Document(lambda: str(chunk.path), _text_blocks(chunk.path))


def _text_blocks(path: Path) -> Iterator[str]:
    r"""Read UTF-8 without its byte order mark, and with the ends of lines as ``\n``.

    Raises:
        BadDocumentError: where the file cannot be read further.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_read = 0
    carriage_return = ""  # the end of the last block, which may be half an end of line
    with open_decompressed(path) as stream:
        is_last = False
        while not is_last:
            try:
                encoded = stream.read1(_BLOCK_BYTES)
            except DamagedDataError as error:
                raise BadDocumentError(str(path), str(error)) from None
            is_last = not encoded
            num_undecoded = len(decoder.getstate()[0])
            try:
                text = carriage_return + decoder.decode(encoded, final=is_last)
            except UnicodeDecodeError as error:
                position = num_read - num_undecoded + error.start
                raise NotUTF8Error(str(path), f"not UTF-8 text (byte {position})") from None
            if num_read == 0:
                text = text.removeprefix("\ufeff")
            num_read += len(encoded)
            carriage_return = "\r" if text.endswith("\r") and not is_last else ""
            yield text.removesuffix(carriage_return).replace("\r\n", "\n")


def _read_json_lines(chunk: TextChunk) -> Iterator[DocumentOrError]:
    line_number = 0  # in this chunk
    lines_before: int | None = None  # of the chunk; counted if a place must be named

    def place() -> str:
        nonlocal lines_before
        if lines_before is None:
            lines_before = _count_lines_before(chunk)
        return f"{chunk.path}:{lines_before + line_number}"

    try:
        for line in _lines(chunk):
            line_number += 1
            text = line.removeprefix(BOM).strip(b" \t\r\n")
            if text:
                yield _json_document(text, chunk.key, place)
    except DamagedDataError as error:
        line_number += 1
        yield BadDocumentError(place(), str(error))


def _lines(chunk: TextChunk) -> Iterator[bytes]:
    """Read the lines that begin in the chunk."""
    with open_decompressed(chunk.path) as stream:
        if is_compressed(chunk.path):
            yield from stream
            return
        if chunk.start:
            # A line belongs to the chunk that it begins in: skip the rest of one that began before.
            stream.seek(chunk.start - 1)
            stream.readline()
        while stream.tell() < chunk.stop and (line := stream.readline()):
            yield line


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


def _read_json_values(chunk: TextChunk) -> Iterator[DocumentOrError]:
    line = 1

    def place() -> str:
        return f"{chunk.path}:{line}"

    try:
        with open_decompressed(chunk.path) as stream:
            for value in split_json_values(stream):
                line = value.line
                if value.text:
                    yield _json_document(value.text.removeprefix(BOM), chunk.key, place)
                else:
                    yield BadDocumentError(place(), "the file ends inside its array")
    except DamagedDataError as error:
        yield BadDocumentError(f"{chunk.path}: after line {line}", str(error))


def _json_document(text: bytes, key: str, place: Callable[[], str]) -> DocumentOrError:
    """Return the document of a JSON object, or what is wrong with it."""
    try:
        return Document(place, [_text_of_record(_parse_json(text), key)])
    except ValueError as error:
        return BadDocumentError(place(), str(error))


def _parse_json(encoded: bytes) -> object:
    """Parse JSON. Raises ValueError with the reason, if it is none."""
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        byte = encoded[error.start]
        raise ValueError(f"byte {error.start + 1} of it, 0x{byte:02x}, is not UTF-8") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = (error.msg[0].lower() + error.msg[1:]).removesuffix(" starting at")
        raise ValueError(f"not JSON: {reason} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON that cannot be read: {error}") from None


def _text_of_record(record: object, key: str) -> str:
    """Return the text of an object. Raises ValueError with the reason, if it has none."""
    if not isinstance(record, dict):
        kind = _JSON_KINDS[type(record)]
        raise ValueError(f"{kind}, not an object with a string under the key {key}")
    if key not in record:
        names = textwrap.shorten(", ".join(record) or "none", 80, placeholder=" ...")
        raise ValueError(f"has no key {key}; its keys are {names} (--key names another)")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"has {_JSON_KINDS[type(text)]} under the key {key}, not a string")
    _refuse_surrogates(text)
    return text


_JSON_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _refuse_surrogates(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"has a lone surrogate, \\u{code:04x}, at character {error.start + 1} of the text: "
            "half of a character that was cut"
        ) from None


def _read_parquet(chunk: TextChunk) -> Iterator[DocumentOrError]:
    if not is_compressed(chunk.path):
        yield from _read_row_groups(chunk, chunk.path, range(chunk.start, chunk.stop))
        return
    # Parquet is read from its end, so the file must be there whole.
    with tempfile.TemporaryFile() as whole, open_decompressed(chunk.path) as stream:
        try:
            while block := stream.read1(_BLOCK_BYTES):
                whole.write(block)
        except DamagedDataError as error:
            yield BadDocumentError(str(chunk.path), str(error))
            return
        num_groups = _open_parquet(whole, chunk.path).num_row_groups
        yield from _read_row_groups(chunk, whole, range(num_groups))


def _read_row_groups(chunk: TextChunk, file, groups: Iterable[int]) -> Iterator[DocumentOrError]:
    parquet = _open_parquet(file, chunk.path)
    columns = parquet.schema_arrow.names
    if chunk.key not in columns:
        raise UserError(
            f"{chunk.path}: has no column {chunk.key}; its columns are {', '.join(columns)}"
        )
    for group in groups:
        row = 0  # in the group
        batches = parquet.iter_batches(_ROWS, row_groups=[group], columns=[chunk.key])
        try:
            for batch in batches:
                for value in batch.column(0):
                    place = f"{chunk.path}: row {row} of row group {group}"
                    yield _parquet_document(value, chunk.key, place)
                    row += 1
        except (OSError, ValueError) as error:
            place = f"{chunk.path}: row group {group} from row {row} on"
            yield BadDocumentError(place, f"cannot be read: {error}")


def _parquet_document(value, key: str, place: str) -> DocumentOrError:
    """Return the document of a cell, a scalar of Arrow's, or what is wrong with it."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return BadDocumentError(place, f"byte {error.start + 1} of its text is not UTF-8")
    if not isinstance(text, str):
        instead = "null" if text is None else value.type
        return BadDocumentError(place, f"has {instead} in column {key}, not a string")
    return Document(lambda: place, [text])


def _open_parquet(file, path: Path):
    """Open a Parquet file at a path, or one that is open, whose ``path`` is for errors."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install longspan[parquet]") from None
    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


_READERS: dict[Format, Callable[[TextChunk], Iterator[DocumentOrError]]] = {
    Format.TEXT: _read_text,
    Format.JSON_LINES: _read_json_lines,
    Format.JSON_VALUES: _read_json_values,
    Format.PARQUET: _read_parquet,
}
