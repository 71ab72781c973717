"""Ranks that wait for one another for ever: a thread in each tells which of them is where, and ends the run."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

_LOOKS = 5
"""Within the time that a phase may take."""


class Watchdog:
    """A context manager; every rank has one and says what it is about to do.

    Nothing is watched before the first phase: to build a model takes its time. Where a phase takes longer than ``seconds``, the
    rank says on stderr in which phase every rank is and since when, and which do not answer, writes the stacks of its threads
    and exits with status 1: what waits in a collective raises nothing.
    """

    def __init__(self, seconds: float):
        self._seconds, self._now, self._over = (
            seconds,
            ("the start", float("inf")),
            threading.Event(),
        )
        self._looks = 0

    def phase(self, name: str) -> None:
        self._now = (name, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if dist.get_world_size() > 1:
            # A connection of its own: the main thread may wait in another.
            store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
            threading.Thread(
                target=self._watch,
                args=(store, dist.get_rank(), dist.get_world_size()),
                daemon=True,
            ).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def _watch(self, store: dist.Store, rank: int, world: int) -> None:
        period = self._seconds / _LOOKS
        with contextlib.suppress(
            RuntimeError, OSError
        ):  # the rank that kept the store has ended: all see it by themselves
            while not self._over.wait(period):
                name, began = self._now
                if self._publish(store, rank) > self._seconds:
                    before = [_read(store, other).looks for other in range(world)]
                    for _ in range(2):  # and go on to answer: the others ask as well
                        time.sleep(period)
                        waited = self._publish(store, rank)
                    if not self._over.is_set() and self._now == (name, began):
                        _end(
                            rank,
                            name,
                            waited,
                            _told([_read(store, other) for other in range(world)], before),
                        )

    def _publish(self, store: dist.Store, rank: int) -> float:
        """Say where this rank is; for how long."""
        name, began = self._now
        self._looks, waited = self._looks + 1, max(0.0, time.monotonic() - began)
        store.set(str(rank), json.dumps([name, waited, self._looks]))
        return waited


class _Place(NamedTuple):
    phase: str
    waited: float
    looks: int
    """How often its rank has said where it is."""


def _told(places: list[_Place], before: list[int]) -> list[str]:
    """A line for each phase that ranks are in; ``before`` is how often each had said so some time ago."""
    found: dict[tuple[bool, str], list[int]] = {}
    for rank, (place, looks) in enumerate(zip(places, before, strict=True)):
        found.setdefault((place.looks != looks, place.phase), []).append(rank)
    lines = []
    for (answers, phase), ranks in found.items():
        longest = max(places[rank].waited for rank in ranks)
        what = f"in {phase} for {longest:.0f} s" if answers else f"not answering, last in {phase}"
        lines.append(f"rank{'s' if len(ranks) > 1 else ''} {_some(ranks)}: {what}")
    return lines


def _read(store: dist.Store, rank: int) -> _Place:
    return (
        _Place(*json.loads(store.get(str(rank))))
        if store.check([str(rank)])
        else _Place("the start", 0.0, 0)
    )


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (
        f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    )


def _end(rank: int, name: str, waited: float, lines: list[str]) -> None:
    print(
        f"longspan: rank {rank}: {name} takes {waited:.0f} s, more than launch.hang_timeout_s",
        file=sys.stderr,
    )
    print("\n".join(f"longspan: {line}" for line in lines), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)
