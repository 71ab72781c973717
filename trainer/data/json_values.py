"""JSON values in a stream: one after another, or as the items of one array."""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK_BYTES = 1 << 20
_OUTSIDE_STRINGS = re.compile(rb'["\[\]{},]')
_INSIDE_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_WHITE_SPACE = b" \t\r\n"


class JSONText(NamedTuple):
    """The text of a value, not parsed yet."""

    text: bytes
    """Empty if the stream ends inside the array."""
    line: int
    """The line that it begins in, from 1."""


def split_json_values(stream: BinaryIO) -> Iterator[JSONText]:
    """Split a stream where its values end; if the first one is an array, the values are its items.

    Memory holds one value at a time. Only brackets, commas and strings are looked at: what is
    yielded may be no JSON, as is whatever follows the array.
    """
    scanner = _Scanner()
    while block := stream.read(_BLOCK_BYTES):
        yield from scanner.scan(block)
    yield from scanner.end()


class _Scanner:
    """What was read of a stream and belongs to no value that was yielded."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._value_start = 0  # in the buffer; white space may come first
        self._scanned = 0  # bytes of the buffer
        self._line = 1  # of the value's start
        self._depth = 0  # of open brackets inside the value
        self._in_string = False
        self._in_array = False
        self._is_first = True  # no bracket, comma or string was seen

    def scan(self, block: bytes) -> Iterator[JSONText]:
        """Go through a block, and yield the values that end in it."""
        del self._buffer[: self._value_start]
        self._scanned -= self._value_start
        self._value_start = 0
        self._buffer += block
        while mark := self._next_mark():
            if self._is_first:
                self._is_first = False
                if mark == b"[" and self._is_blank(self._scanned - 1):
                    self._in_array = True
                    self._drop_mark()
                    continue
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                self._depth += 1
            elif mark in b"]}" and self._depth:
                self._depth -= 1
                if self._depth == 0 and not self._in_array:
                    yield from self._take(self._scanned)
            elif mark in b",]" and self._depth == 0 and self._in_array:
                yield from self._take(self._scanned - 1)
                self._drop_mark()
                self._in_array = mark == b","

    def end(self) -> Iterator[JSONText]:
        """Yield what the stream ends with, if it is more than white space."""
        yield from self._take(len(self._buffer))
        if self._in_array:
            yield JSONText(b"", self._line)

    def _is_blank(self, stop: int) -> bool:
        """Tell whether there is nothing up to ``stop`` but a byte order mark and white space."""
        return not self._buffer[:stop].removeprefix(codecs.BOM_UTF8).strip()

    def _next_mark(self) -> bytes:
        """Read up to a bracket, a comma or the begin of a string, or, with b"", all there is."""
        if self._in_string:
            inside = _INSIDE_STRING.match(self._buffer, self._scanned)
            assert inside, "the pattern also matches nothing"
            self._scanned = inside.end()
            if self._buffer[self._scanned : self._scanned + 1] != b'"':
                return b""  # the block ends in the string, perhaps behind a backslash
            self._scanned += 1
            self._in_string = False
        found = _OUTSIDE_STRINGS.search(self._buffer, self._scanned)
        self._scanned = found.end() if found else len(self._buffer)
        return found.group() if found else b""

    def _take(self, stop: int) -> Iterator[JSONText]:
        """Yield the value that ends at ``stop``, unless there is nothing."""
        text = bytes(self._buffer[self._value_start : stop])
        value = text.lstrip(_WHITE_SPACE)
        if value:
            lines_before = text.count(b"\n", 0, len(text) - len(value))
            yield JSONText(value.rstrip(_WHITE_SPACE), self._line + lines_before)
        self._line += text.count(b"\n")
        self._value_start = stop

    def _drop_mark(self) -> None:
        """Begin a value behind the mark that was read last."""
        self._line += self._buffer.count(b"\n", self._value_start, self._scanned)
        self._value_start = self._scanned
