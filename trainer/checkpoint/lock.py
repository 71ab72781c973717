"""The lock of a run folder: one run at a time writes there."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path


class LockedError(Exception):
    """Another process holds the lock."""


class FolderLock:
    """A file lock of the operating system: it goes with the process, however that ends."""

    def __init__(self, file: Path):
        self._file = file

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock; its file names this process.

        Raises:
            LockedError: another process holds it.
        """
        with self._file.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    @property
    def holder(self) -> str:
        """The process that holds the lock, or held it last."""
        return self._file.read_text() or "another process"

    def is_held(self) -> bool:
        """Return whether a process holds the lock."""
        if not self._file.exists():
            return False
        with self._file.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
