"""Checkpoints across ranks: written in the background while training goes on, restored on whatever ranks there are."""

import datetime
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from ..checkpoint.files import (
    Checkpoint,
    DamagedError,
    Manifest,
    checkpoints,
    clean_up,
    commit,
    partial_path,
    prune,
    quarantine,
    sha256,
)
from ..checkpoint.shards import LoadPlanner, SavePlanner, Shards
from ..engines.engine import Engine
from ..ranks import RankGroup


class Saved(NamedTuple):
    """What became of a save; on every rank a success, or on every rank an error."""

    step: int
    seconds: float
    error: str | None
    warning: str | None = None
    """Of the first rank: the checkpoint is whole, but old ones could not be removed."""


class Checkpointer:
    """A context manager; every rank has one and calls it at the same steps.

    Args:
        folder: of the checkpoints of a run, on a disk that all ranks share.
        keep: how many to keep, the newest; 0 for all.
    """

    def __init__(self, folder: Path, keep: int, ranks: RankGroup):
        self.folder, self._keep, self._ranks = folder, keep, ranks
        self._first = dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo")  # of the background thread alone
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self.last_step = 0
        """Of the newest whole checkpoint that is known."""

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        """Let a save come to its end also where an error ends the run; not for ever, as ranks may have died."""
        if self._thread:
            self._thread.join(60)

    def restore(self, engine: Engine, say: Callable[[str], None]) -> Manifest | None:
        """Load the newest whole checkpoint, the same one on every rank; None where there is none at all.

        A damaged one is named through ``say`` (of the first rank) and set aside, and the one before it is tried.

        Raises:
            UserError: where there are checkpoints and all are damaged, or one is of a newer format.
        """
        if self._first:
            clean_up(self.folder)
        damaged: list[tuple[Checkpoint, str]] = []
        for checkpoint in self._ranks.broadcast(checkpoints(self.folder)):
            manifest, damage = self._check(checkpoint)
            if damage:
                damaged.append((checkpoint, damage))
                continue
            for bad, reason in damaged if self._first else ():
                aside = quarantine(bad).name
                say(
                    f"warning: {bad.path}: {reason}; set aside as {aside}, going on from step {manifest.step}"
                )
            self._load(checkpoint, engine, manifest)
            self.last_step = manifest.step
            return manifest
        if damaged:
            lines = [f"{checkpoint.path}: {reason}" for checkpoint, reason in damaged]
            lines.append(
                f"{self.folder}: holds no whole checkpoint; remove the folder to train from step 0"
            )
            raise self._ranks.failure("\n".join(lines))
        return None

    def save(self, engine: Engine, step: int, tokens: int) -> Saved | None:
        """Copy the state and write it in the background, after a save that is still under way, whose end is returned."""
        before = self.poll(wait=True)
        if step != self.last_step:
            state = {name: shards.snapshot() for name, shards in engine.state().items()}
            self._saved = None
            work = (state, step, tokens, engine.ranks)
            self._thread = threading.Thread(
                target=self._write, args=work, daemon=True, name="checkpoint"
            )
            self._thread.start()
        return before

    def poll(self, wait: bool = False) -> Saved | None:
        """What became of the last save, once: when it has ended on every rank, for which ``wait`` waits."""
        if not self._thread or (not wait and self._ranks.any(self._thread.is_alive())):
            return None
        self._thread.join()
        self._thread = None
        assert self._saved is not None, (
            "the thread that writes checkpoints died; its error is above"
        )
        if not self._saved.error:
            self.last_step = self._saved.step
        return self._saved

    def _check(self, checkpoint: Checkpoint) -> tuple[Manifest | None, str | None]:
        """The manifest, and what is wrong with the checkpoint: each rank reads its share of the files."""
        manifest = damage = None
        with self._ranks.raise_on_all():
            if self._first:
                try:
                    manifest = checkpoint.manifest()
                except DamagedError as error:
                    damage = str(error)
        manifest, damage = self._ranks.broadcast((manifest, damage))
        if damage is None:
            shares = self._ranks.gather(
                checkpoint.damage(manifest, dist.get_rank(), dist.get_world_size())
            )
            damage = next(filter(None, shares), None)
        return manifest, damage

    def _load(self, checkpoint: Checkpoint, engine: Engine, manifest: Manifest) -> None:
        state = engine.state()
        if manifest.ranks != engine.ranks:  # other ranks draw other random numbers
            state = {name: shards for name, shards in state.items() if not name.startswith("rng.")}
        reader = FileSystemReader(checkpoint.path)
        try:
            dcp.load(state, storage_reader=reader, planner=LoadPlanner(), process_group=self._group)
        except CheckpointException as failed:
            raise self._ranks.failure(
                f"{checkpoint.path}: cannot be loaded: {_first_failure(failed)}"
            ) from None
        engine.restored(state)

    def _write(self, state: dict[str, Shards], step: int, tokens: int, ranks: str) -> None:
        """In the thread: all ranks write their boxes, the first commits."""
        began, partial, rank = time.monotonic(), partial_path(self.folder, step), dist.get_rank()
        error = warning = None
        try:
            dcp.save(
                state,
                storage_writer=FileSystemWriter(partial),
                planner=SavePlanner(),
                process_group=self._group,
            )
            mine = [*partial.glob(f"__{rank}_*"), *([partial / ".metadata"] if self._first else [])]
            parts = self._agree(
                lambda: {path.name: (path.stat().st_size, sha256(path)) for path in mine}
            )
            files = {name: entry for part in parts for name, entry in part.items()}
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            self._agree(
                lambda: (
                    commit(partial, Manifest(step, tokens, ranks, now, files))
                    if self._first
                    else None
                )
            )
        except CheckpointException as failed:
            # Torch says no more of a full disk than that its file has not the length it should have.
            error = f"{_first_failure(failed)} ({_free_space(self.folder)})"
            if self._first:
                shutil.rmtree(partial, ignore_errors=True)
        if self._first and not error:
            try:
                prune(self.folder, self._keep)
            except OSError as failed:
                warning = f"old checkpoints cannot be removed: {failed}"
        self._saved = Saved(step, time.monotonic() - began, error, warning)

    def _agree(self, work: Callable[[], object]) -> list:
        """Every rank's result; where it fails on some, all of them raise what DCP raises then."""
        try:
            outcome = work(), None
        except Exception as caught:
            outcome = None, caught
        outcomes: list = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self._group)
        failures = {rank: (caught, None) for rank, (_, caught) in enumerate(outcomes) if caught}
        if failures:
            raise CheckpointException("save", failures)
        return [result for result, _ in outcomes]


def _first_failure(failed: CheckpointException) -> str:
    rank, (error, _) = next(iter(failed.failures.items()))
    return f"rank {rank}: {(str(error) or repr(error)).splitlines()[0]}"


def _free_space(folder: Path) -> str:
    try:
        return f"the disk has {shutil.disk_usage(folder).free / 2**20:,.0f} MiB left"
    except OSError as error:
        return f"the disk does not say how much is left: {error.strerror}"
