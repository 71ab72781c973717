"""Requests to stop a run: by a signal to any rank, by a file, or by the end of its parent process.

What is here only notes a request on the rank that receives it. The decision is the loop's: after
every step all ranks ask one another whether any of them has a request (``stop_or_save`` in
:mod:`.loop`), so that they stop after the same step.
"""

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 2.0
"""Signals so soon after the first are the same request.

Schedulers send one to every process, and parents pass theirs on.
"""
PARENT_PIPE = "LONGSPAN_LIFELINE"
"""Environment variable: the reading end of a pipe that ends when the parent process does."""


class StopRequest:
    """Notes SIGTERM, SIGUSR1, Ctrl-C and the file ``STOP``; a second signal ends the process.

    A context manager.

    A thread of its own reads the signals, since the main thread may hang in a collective, where no
    handler of Python's runs.
    """

    def __init__(self, file: Path):
        self._file = file
        self._requested_at: float | None = None
        # One process per machine looks for the file, not thousands on one disk.
        self._checks_file = int(os.environ.get("LOCAL_RANK", 0)) == 0

    def __enter__(self) -> "StopRequest":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous_handlers = {
            number: signal.signal(number, _wake) for number in not_ignored(SIGNALS)
        }
        threading.Thread(target=self._watch, daemon=True, name="stop").start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._write_end)  # which ends the thread

    def is_requested(self) -> bool:
        """Return whether this rank knows of a request to stop."""
        if self._requested_at is not None:
            return True
        return self._checks_file and self._file.exists()

    def _watch(self) -> None:
        """In the thread: wait for signals, and for the end of the parent if it gave a pipe."""
        parent_pipe = int(os.environ.get(PARENT_PIPE, -1))
        sources = [self._read_end] if parent_pipe < 0 else [self._read_end, parent_pipe]
        while True:
            ready = select.select(sources, [], [])[0]
            if parent_pipe in ready:
                sources.remove(parent_pipe)
                self._requested_at = self._requested_at or time.monotonic()
            if self._read_end in ready:
                numbers = os.read(self._read_end, 64)
                if not numbers:
                    os.close(self._read_end)
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self._note(number)

    def _note(self, number: int) -> None:
        if self._requested_at is None:
            self._requested_at = time.monotonic()
        elif time.monotonic() - self._requested_at > REPEAT_SECONDS:
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):
                os.write(2, f"longspan: ended at once by a second {name}\n".encode())
            os._exit(128 + number)


def not_ignored(signals: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Return the signals that this process was not started to ignore.

    ``nohup`` and a shell's ``&`` start processes that ignore some.
    """
    return [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]


def _wake(number: int, frame: object) -> None:
    """Do nothing: with a handler, Python writes the signal's number to the wakeup descriptor."""
