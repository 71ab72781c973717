"""The lock of a run folder: one run at a time writes there."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..file_locks import LockedError, NoLocksError, lock_file


class FolderLock:
    """A file lock of the operating system: it goes with the process, however that ends."""

    def __init__(self, file: Path):
        self._file = file

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Hold the lock; its file names this process.

        Yields:
            Whether it is held: not on a file system that has no locks.

        Raises:
            LockedError: another process holds it.
        """
        with self._file.open("a+") as file:
            has_lock = True
            try:
                lock_file(file)
            except NoLocksError:
                has_lock = False
            with contextlib.suppress(OSError):  # a full disk: the name is only for messages
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield has_lock

    @property
    def holder(self) -> str:
        """The process that holds the lock, or held it last."""
        try:
            return self._file.read_text(errors="replace") or "another process"
        except OSError:
            return "another process"

    def is_held(self) -> bool | None:
        """Return whether a process holds the lock, or None if the file system cannot tell."""
        if not self._file.is_file():
            return False
        with self._file.open() as file:
            try:
                lock_file(file, shared=True)
            except LockedError:
                return True
            except NoLocksError:
                return None
        return False
