"""Ends a run whose ranks wait for one another forever, and says which rank is where."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from typing import Any, NamedTuple

import torch.distributed as dist

_CHECKS = 5
"""Checks within the time that a phase may take."""
_NAMED_RANKS = 8
"""Ranks that a line lists by number before it only counts."""


class Watchdog:
    """A context manager; every rank has one and says what it is about to do.

    Nothing is watched before the first phase, because building a model takes its time. If a phase
    takes longer than ``seconds``, the rank writes to stderr which phase every rank is in and since
    when, which ranks do not answer, and the stacks of its threads, and exits with status 1: what
    waits in a collective raises nothing.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._phase = _Phase("the start", float("inf"))
        self._over = threading.Event()
        self._checks = 0

    def phase(self, name: str) -> None:
        """Say what this rank is about to do; the phase before is over."""
        self._phase = _Phase(name, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if dist.get_world_size() > 1:
            # A connection of its own: the main thread may wait in another. (torch's type stubs do
            # not know clone().)
            default_store: Any = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore("watchdog", default_store.clone())
            threading.Thread(
                target=self._watch,
                args=(store, dist.get_rank(), dist.get_world_size()),
                daemon=True,
            ).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def _watch(self, store: dist.Store, rank: int, world_size: int) -> None:
        period = self._seconds / _CHECKS
        # The store is lost when the rank that keeps it has ended, and that all ranks see by
        # themselves.
        with contextlib.suppress(RuntimeError, OSError):
            while not self._over.wait(period):
                phase = self._phase
                if self._publish(store, rank) > self._seconds:
                    checks_before = [_read(store, other).checks for other in range(world_size)]
                    for _ in range(2):  # continue to answer: the others ask as well
                        time.sleep(period)
                        waited = self._publish(store, rank)
                    if not self._over.is_set() and self._phase == phase:
                        reports = [_read(store, other) for other in range(world_size)]
                        _end_process(rank, phase.name, waited, _describe(reports, checks_before))

    def _publish(self, store: dist.Store, rank: int) -> float:
        """Tell the other ranks which phase this one is in; return for how many seconds."""
        phase = self._phase
        self._checks += 1
        waited = max(0.0, time.monotonic() - phase.began)
        store.set(str(rank), json.dumps([phase.name, waited, self._checks]))
        return waited


class _Phase(NamedTuple):
    name: str
    began: float


class _RankReport(NamedTuple):
    """What a rank has published last."""

    phase: str
    waited: float
    checks: int
    """How often the rank has published."""


def _describe(reports: list[_RankReport], checks_before: list[int]) -> list[str]:
    """Return a line for each phase that ranks are in.

    Args:
        checks_before: the ranks' ``checks`` of some time ago; a rank that has published nothing
            since does not answer.
    """
    ranks_by_state: dict[tuple[bool, str], list[int]] = {}
    for rank, (report, before) in enumerate(zip(reports, checks_before, strict=True)):
        answers = report.checks != before
        ranks_by_state.setdefault((answers, report.phase), []).append(rank)

    lines = []
    for (answers, phase), ranks in ranks_by_state.items():
        plural = "s" if len(ranks) > 1 else ""
        longest = max(reports[rank].waited for rank in ranks)
        state = f"in {phase} for {longest:.0f} s" if answers else f"not answering, last in {phase}"
        lines.append(f"rank{plural} {_list_ranks(ranks)}: {state}")
    return lines


def _read(store: dist.Store, rank: int) -> _RankReport:
    if not store.check([str(rank)]):
        return _RankReport("the start", 0.0, 0)
    return _RankReport(*json.loads(store.get(str(rank))))


def _list_ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:_NAMED_RANKS]))
    rest = len(ranks) - _NAMED_RANKS
    return f"{listed} and {rest} more" if rest > 0 else listed


def _end_process(rank: int, phase: str, waited: float, lines: list[str]) -> None:
    print(
        f"longspan: rank {rank}: {phase} takes {waited:.0f} s, more than launch.hang_timeout_s",
        file=sys.stderr,
    )
    print("\n".join(f"longspan: {line}" for line in lines), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)
