"""The ranks of a run on this machine: started together, stopped together, one exit status.

Who asks whom to stop:

- A person or a scheduler sends SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP to the parent, the
  process that called ``run_ranks``. It sends SIGTERM to every rank, and waits. The ranks agree on a
  step, save, and exit with ``STOPPED`` (75). Signals that come to the ranks themselves mean the
  same (:mod:`longspan.trainer.run.stop`).
- A second signal, more than ``REPEAT_SECONDS`` after the first, makes the parent kill the ranks at
  once and exit with 128 + its number. Until then it is the same request: schedulers send a signal
  to every process.
- If the parent is killed, the pipe whose writing end it holds comes to its end. Every rank has the
  reading end (``PARENT_PIPE``), and takes that for a request to stop.
- If a rank fails, the others get ``_GRACE_SECONDS`` to notice and clean up; then they are killed.

The exit status is that of the first rank found to have failed (128 + the signal's number for one
that a signal ended), else ``STOPPED`` if a rank stopped on request, else 0.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

from ..trainer.errors import STOPPED, NonFiniteError, UserError
from ..trainer.run.stop import PARENT_PIPE, REPEAT_SECONDS, SIGNALS, not_ignored
from ..trainer.versions import TRAINING, require_supported

# The others notice a rank that failed within a second, as their collectives fail; then they clean
# up.
_GRACE_SECONDS = 30.0


def run_ranks(command: list[str], count: int, threads: int) -> int:
    """Run a command as ranks, with torchrun's environment, and return their common exit status.

    A signal that asks to stop is passed on, so that the ranks stop together in their own time
    (torchrun would give them 30 s); a second one ends them at once. They also stop when this
    process is killed.

    Args:
        command: of every rank.
        count: the number of ranks.
        threads: of every rank, unless ``OMP_NUM_THREADS`` is set.

    Raises:
        UserError: longspan does not work with what is installed.
    """
    require_supported(*TRAINING)  # once, rather than in each of the ranks
    from torch.distributed import TCPStore

    # This process keeps the rendezvous store, as torchrun's agent does, so no port is chosen before
    # it is bound.
    store = TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
    )
    # Nothing is written to the pipe: the ranks see its end when this process ends, in whatever way.
    pipe_reading, pipe_writing = os.pipe()
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        PARENT_PIPE: str(pipe_reading),
    }

    received: list[int] = []  # numbers of signals, in order
    previous_handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in not_ignored((*SIGNALS, signal.SIGHUP))
    }
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(count):
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    # A session of its own: Ctrl-C in a terminal comes to the rank once, from here.
                    start_new_session=True,
                    pass_fds=[pipe_reading],
                )
            )
        return _wait(ranks, received)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        os.close(pipe_reading)
        os.close(pipe_writing)


def _wait(ranks: list[subprocess.Popen], received: list[int]) -> int:
    """Wait until all ranks have ended, and return their exit status.

    Returns earlier, with ranks still running, if one has failed and the others had time to notice,
    or if a second signal has come.

    Args:
        ranks: their processes.
        received: the numbers of the signals to this process, which its handlers append to.
    """
    failed_status = 0
    failure_deadline: float | None = None
    stop_asked: float | None = None
    while True:
        running = [process for process in ranks if process.poll() is None]
        out_of_time = failure_deadline is not None and time.monotonic() > failure_deadline
        if not running or out_of_time:
            return failed_status or _failed_status(ranks) or max(p.returncode for p in ranks)

        while received:
            number = received.pop(0)
            if stop_asked is None:
                stop_asked = time.monotonic()
                for process in running:
                    process.send_signal(signal.SIGTERM)
            elif time.monotonic() - stop_asked > REPEAT_SECONDS:
                name = signal.Signals(number).name
                print(f"longspan: ended at once by a second {name}", file=sys.stderr)
                return 128 + number

        if failure_deadline is None:
            failed_status = _failed_status(ranks)
            if failed_status:
                failure_deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(0.05)


def _failed_status(ranks: list[subprocess.Popen]) -> int:
    """Return the exit status of a rank that has failed, or 0 if none has.

    Says on stderr what the rank could not say itself.
    """
    failed = {
        rank: process.returncode
        for rank, process in enumerate(ranks)
        if process.returncode not in (None, 0, STOPPED)
    }
    # A rank that was killed is the reason why others have failed.
    for rank, status in failed.items():
        if status < 0:
            name = signal.Signals(-status).name
            print(f"longspan: rank {rank} was ended by {name}", file=sys.stderr)
            return 128 - status

    for rank, status in failed.items():
        # These have printed their problems.
        if status not in (UserError.exit_status, NonFiniteError.exit_status):
            print(
                f"longspan: rank {rank} ended with status {status}; its error is above",
                file=sys.stderr,
            )
        return status
    return 0
