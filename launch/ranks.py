"""The ranks of a run on this machine: started together, stopped together, one exit status."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

from ..trainer.errors import STOPPED, NonFiniteError, UserError
from ..trainer.stop import SIGNALS

# How long the others get to notice by themselves that one has failed: their collectives tell them within a second.
_GRACE_SECONDS = 5.0


def run_ranks(command: list[str], count: int, threads: int) -> int:
    """Run ``command`` as ``count`` ranks with torchrun's environment, and give the status of the first that failed.

    Signals that ask to stop are passed on, so that the ranks stop together in their own time (torchrun would give them 30 s).
    """
    from torch.distributed import TCPStore

    # This process keeps the rendezvous store, as torchrun's agent does, so no port is chosen before it is bound.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    handled = (*SIGNALS, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in handled}
    try:
        for rank in range(count):
            # A session of their own: Ctrl-C in a terminal comes to them once, from here.
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _wait(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Until all have ended, or one has failed and the others had time to see it."""
    failed, deadline = 0, None
    while any(rank.poll() is None for rank in ranks) and (deadline is None or time.monotonic() < deadline):
        if deadline is None and (failed := _failure(ranks)):
            deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(0.05)
    return failed or _failure(ranks) or max(rank.returncode for rank in ranks)


def _failure(ranks: list[subprocess.Popen]) -> int:
    """The status of a rank that has failed, told on stderr where it could not tell itself; 0 while there is none."""
    ended = {number: rank.returncode for number, rank in enumerate(ranks) if rank.returncode not in (None, 0, STOPPED)}
    for number, status in ended.items():  # a rank that was killed is why others have failed
        if status < 0:
            print(f"longspan: rank {number} was ended by {signal.Signals(-status).name}", file=sys.stderr)
            return 128 - status
    for number, status in ended.items():
        if status not in (UserError.exit_status, NonFiniteError.exit_status):
            print(f"longspan: rank {number} ended with status {status}; its error is above", file=sys.stderr)
        return status
    return 0
