"""Asking a run to stop: by a signal to any rank, or by a file."""

import os
import signal
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A context manager that notes SIGTERM, SIGUSR1, Ctrl-C and the file ``STOP``; a second signal ends the process at once."""

    def __init__(self, file: Path):
        self._file, self._signalled = file, False
        # One process per machine looks for the file, not thousands on one disk.
        self._looks = int(os.environ.get("LOCAL_RANK", 0)) == 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether this rank knows of a request."""
        return self._signalled or (self._looks and self._file.exists())

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the system's own way to end a process, even one that hangs in a collective
