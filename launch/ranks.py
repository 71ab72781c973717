"""The ranks of a run on this machine: started together, stopped together, one exit status."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

from ..trainer.errors import STOPPED, NonFiniteError, UserError
from ..trainer.run.stop import PARENT_PIPE, REPEAT_SECONDS, SIGNALS, not_ignored

# How long the others get once a rank has failed: their collectives tell them within a second, then they clean up.
_GRACE_SECONDS = 30.0


def run_ranks(command: list[str], count: int, threads: int) -> int:
    """Run ``command`` as ``count`` ranks with torchrun's environment, and give the status of the first that failed.

    A signal that asks to stop is passed on, so that the ranks stop together in their own time (torchrun would give them
    30 s); a second one ends them at once. They stop as well when this process is killed.
    """
    from torch.distributed import TCPStore

    # This process keeps the rendezvous store, as torchrun's agent does, so no port is chosen before it is bound.
    store = TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
    )
    lifeline, held = os.pipe()  # this process holds the writing end until it ends, in whatever way
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        PARENT_PIPE: str(lifeline),
    }
    received: list[int] = []
    numbers = not_ignored((*SIGNALS, signal.SIGHUP))
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in numbers
    }
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(count):
            # A session of their own: Ctrl-C in a terminal comes to them once, from here.
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    command, env=environment, start_new_session=True, pass_fds=[lifeline]
                )
            )
        return _wait(ranks, received)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(lifeline)
        os.close(held)


def _wait(ranks: list[subprocess.Popen], received: list[int]) -> int:
    """Until all have ended, or one has failed and the others had time to see it, or a second signal has come."""
    failed = 0
    deadline = asked = None
    while True:
        running = [rank for rank in ranks if rank.poll() is None]
        if not running or (deadline is not None and time.monotonic() > deadline):
            return failed or _failure(ranks) or max(rank.returncode for rank in ranks)
        while received:
            number = received.pop(0)
            if asked is None:
                asked = time.monotonic()
                for rank in running:
                    rank.send_signal(signal.SIGTERM)
            elif time.monotonic() - asked > REPEAT_SECONDS:
                print(
                    f"longspan: ended at once by a second {signal.Signals(number).name}",
                    file=sys.stderr,
                )
                return 128 + number
        if deadline is None and (failed := _failure(ranks)):
            deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(0.05)


def _failure(ranks: list[subprocess.Popen]) -> int:
    """The status of a rank that has failed, told on stderr where it could not tell itself; 0 while there is none."""
    ended = {
        number: rank.returncode
        for number, rank in enumerate(ranks)
        if rank.returncode not in (None, 0, STOPPED)
    }
    for number, status in ended.items():  # a rank that was killed is why others have failed
        if status < 0:
            print(
                f"longspan: rank {number} was ended by {signal.Signals(-status).name}",
                file=sys.stderr,
            )
            return 128 - status
    for number, status in ended.items():
        if status not in (UserError.exit_status, NonFiniteError.exit_status):
            print(
                f"longspan: rank {number} ended with status {status}; its error is above",
                file=sys.stderr,
            )
        return status
    return 0
