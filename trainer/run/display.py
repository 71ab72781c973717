"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


class Display:
    """A context manager; for rank 0 alone."""

    def __init__(self, steps: int, log_interval: int, steps_done: int = 0):
        """``steps_done`` of the ``steps`` were done before this process began."""
        self._steps = steps
        self._log_interval = log_interval
        self._steps_done = steps_done
        self._started = time.monotonic()
        self._bar: _Bar | None = None

    def __enter__(self) -> "Display":
        if sys.stdout.isatty():
            self._bar = _Bar(self._steps, self._steps_done)
        return self

    def __exit__(self, *error) -> None:
        if self._bar:
            self._bar.stop()

    def step(
        self, step: int, loss: float, bits_per_byte: float | None, tokens_per_second: float
    ) -> None:
        """Show that step ``step`` (from 1) has ended.

        Without a terminal only every ``log_interval`` steps, and for the first and last one.
        """
        bits = f"  {bits_per_byte:.3f} bits/byte" if bits_per_byte is not None else ""
        line = f"loss {loss:.4f}{bits}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(step, line)
        elif step % self._log_interval == 0 or step in (self._steps_done + 1, self._steps):
            seconds_per_step = (time.monotonic() - self._started) / (step - self._steps_done)
            remaining = _clock(seconds_per_step * (self._steps - step))
            self.say(
                f"step {step:>{len(str(self._steps))}}/{self._steps}  {line}  {remaining} left"
            )

    def say(self, line: str) -> None:
        """Show a line that stays."""
        if self._bar:
            self._bar.say(line)
        else:
            print_line(line)


def print_line(line: str) -> None:
    """Print a line at once.

    Nothing is raised if the output has no place left, or nobody to read it: a run goes on.
    """
    with contextlib.suppress(OSError):
        print(line, flush=True)


class _Bar:
    """A live progress bar of rich, with lines that stay above it."""

    def __init__(self, steps: int, steps_done: int):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress: Progress = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._task: TaskID = self._progress.add_task("", total=steps, completed=steps_done)
        self._progress.start()

    def update(self, step: int, description: str) -> None:
        self._progress.update(self._task, completed=step, description=description)

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def _clock(seconds: float) -> str:
    """Return a duration as ``hours:minutes:seconds``."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
