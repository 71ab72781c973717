"""Asking a run to stop: by a signal to any rank, by a file, or by the end of the process that started it."""

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 2.0
"""Signals so soon after the first are the same request: schedulers send one to every process, and parents pass theirs on."""
PARENT_PIPE = "LONGSPAN_LIFELINE"
"""Environment variable: a pipe's reading end, which comes to its end when the process that started this one does."""


class StopRequest:
    """A context manager that notes SIGTERM, SIGUSR1, Ctrl-C and the file ``STOP``; a second signal ends the process at once.

    A thread of its own reads the signals, since the main thread may hang in a collective, where no handler of Python's runs.
    """

    def __init__(self, file: Path):
        self._file, self._first = file, None
        # One process per machine looks for the file, not thousands on one disk.
        self._looks = int(os.environ.get("LOCAL_RANK", 0)) == 0

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _wake) for number in not_ignored(SIGNALS)}
        threading.Thread(target=self._watch, daemon=True, name="stop").start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        os.close(self._write)  # which ends the thread

    def asked(self) -> bool:
        """Whether this rank knows of a request."""
        return self._first is not None or (self._looks and self._file.exists())

    def _watch(self) -> None:
        lifeline = int(os.environ.get(PARENT_PIPE, -1))
        sources = [self._read] if lifeline < 0 else [self._read, lifeline]
        while True:
            ready = select.select(sources, [], [])[0]
            if lifeline in ready:
                sources.remove(lifeline)
                self._first = self._first or time.monotonic()
            if self._read in ready:
                numbers = os.read(self._read, 64)
                if not numbers:
                    os.close(self._read)
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self._note(number)

    def _note(self, number: int) -> None:
        if self._first is None:
            self._first = time.monotonic()
        elif time.monotonic() - self._first > REPEAT_SECONDS:
            with contextlib.suppress(OSError):
                os.write(
                    2,
                    f"longspan: ended at once by a second {signal.Signals(number).name}\n".encode(),
                )
            os._exit(128 + number)


def not_ignored(signals: tuple[int, ...]) -> list[int]:
    """Those that this process was not started to ignore, as nohup and a shell's & have it."""
    return [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]


def _wake(number: int, frame: object) -> None:
    """Makes Python write the signal's number to the wakeup descriptor."""
