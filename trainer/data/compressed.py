"""Files that may be compressed with gzip or Zstandard, read as if they were not."""

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 1 << 16


class DamagedDataError(Exception):
    """Compressed data that cannot be decompressed, with the reason."""


def is_compressed(path: Path) -> bool:
    """Tell by its first bytes whether a file is compressed, whatever its name says."""
    with path.open("rb") as stream:
        return stream.read(4).startswith((_GZIP_MAGIC, _ZSTD_MAGIC))


def open_decompressed(path: Path) -> io.BufferedReader:
    """Open a file; what is read from it is decompressed if the file is compressed.

    Reading raises :class:`DamagedDataError` where the compressed data is damaged or cut short.

    Raises:
        UserError: if what decompresses the file is not installed.
    """
    stream = path.open("rb")
    magic = stream.read(4)
    stream.seek(0)
    if magic.startswith(_GZIP_MAGIC):
        return io.BufferedReader(_Gzip(stream), _BLOCK_BYTES)
    if magic.startswith(_ZSTD_MAGIC):
        return io.BufferedReader(_Zstandard(stream, path), _BLOCK_BYTES)
    return stream


class _Decompressed(io.RawIOBase):
    """What the decompressed data of a stream is read through."""

    def __init__(self, stream: BinaryIO):
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Gzip(_Decompressed):
    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self._decompressed = gzip.GzipFile(fileobj=stream)

    def readinto(self, buffer) -> int:
        try:
            # What comes before damage is still read: a larger buffer would be lost with it.
            decompressed = self._decompressed.read1(len(buffer))
        except EOFError:
            raise DamagedDataError("its gzip data is cut short") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DamagedDataError(f"its gzip data is damaged ({error})") from None
        buffer[: len(decompressed)] = decompressed
        return len(decompressed)


class _Zstandard(_Decompressed):
    """Frames of Zstandard. The library's own reader takes data that is cut short for its end."""

    def __init__(self, stream: BinaryIO, path: Path):
        super().__init__(stream)
        try:
            import zstandard
        except ImportError:
            stream.close()
            raise UserError(f"{path}: needs zstandard: pip install longspan[zstd]") from None
        self._library = zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_is_empty = True
        self._compressed = b""
        self._decompressed = b""

    def readinto(self, buffer) -> int:
        while not self._decompressed:
            if not self._compressed:
                self._compressed = self._stream.read(_BLOCK_BYTES)
            if not self._compressed:
                if self._frame_is_empty:
                    return 0
                raise DamagedDataError("its Zstandard data is cut short")
            self._decompress()
        size = min(len(buffer), len(self._decompressed))
        buffer[:size] = self._decompressed[:size]
        self._decompressed = self._decompressed[size:]
        return size

    def _decompress(self) -> None:
        """Decompress what was read, up to the end of a frame."""
        try:
            self._decompressed = self._frame.decompress(self._compressed)
        except self._library.ZstdError as error:
            raise DamagedDataError(f"its Zstandard data is damaged ({error})") from None
        self._frame_is_empty = False
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = self._library.ZstdDecompressor().decompressobj()
            self._frame_is_empty = True
