"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import sys
import time


class Display:
    """A context manager; for rank 0 alone."""

    def __init__(self, steps: int, log_interval: int, done: int = 0):
        """``done`` of the ``steps`` were taken before this run."""
        self.steps, self.log_interval, self.done = steps, log_interval, done
        self._started, self._progress = time.monotonic(), None

    def __enter__(self) -> "Display":
        if sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns)
            self._task = self._progress.add_task("", total=self.steps, completed=self.done)
            self._progress.start()
        return self

    def __exit__(self, *error) -> None:
        if self._progress:
            self._progress.stop()

    def step(
        self, step: int, loss: float, bits_per_byte: float | None, tokens_per_sec: float
    ) -> None:
        """After step ``step`` (from 1)."""
        bits = f"  {bits_per_byte:.3f} bits/byte" if bits_per_byte is not None else ""
        line = f"loss {loss:.4f}{bits}  {tokens_per_sec:,.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=step, description=line)
        elif step % self.log_interval == 0 or step in (self.done + 1, self.steps):
            left = (time.monotonic() - self._started) / (step - self.done) * (self.steps - step)
            self.say(
                f"step {step:>{len(str(self.steps))}}/{self.steps}  {line}  {_clock(left)} left"
            )

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._progress:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
