"""Checkpoints across ranks: written in the background, restored on whatever ranks there are.

How a save survives ``kill -9``, a full disk or a lost rank: all files are written to
``step-N.partial/``, and only when every rank has written its own does rank 0 add the manifest,
flush it to the disk and rename the folder to ``step-N/``. The rename is the moment from which the
checkpoint exists. If the process is killed before it, a ``.partial`` folder stays: the next start
removes it and resumes from the checkpoint before, or at step 0 if there is none. If it is killed
afterwards, while old checkpoints are pruned, at worst another ``.partial`` folder stays. See
:mod:`longspan.trainer.checkpoint.files`.
"""

import datetime
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from ..checkpoint.files import (
    LOSS_SCALE,
    Checkpoint,
    DamagedError,
    FileEntry,
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

T = TypeVar("T")


class SaveOutcome(NamedTuple):
    """How a save ended: well on every rank, or with an error on every rank."""

    step: int
    seconds: float
    error: str | None
    warning: str | None = None
    """On rank 0 only: the checkpoint is whole, but old ones could not be removed."""


class Checkpointer:
    """Saves and restores the state of an engine.

    A context manager; every rank has one and calls it at the same steps.

    Args:
        folder: of the run's checkpoints, on a disk that all ranks share.
        keep: how many checkpoints to keep, the newest; 0 for all.
    """

    def __init__(self, folder: Path, keep: int, ranks: RankGroup):
        self.folder = folder
        self._keep = keep
        self._ranks = ranks
        # The background thread's own group: its collectives must not mix with those of the main
        # thread.
        self._group = dist.new_group(backend="gloo", timeout=ranks.timeout)
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None
        self.last_step = 0
        """Step of the newest checkpoint known to be whole; 0 if there is none."""

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        """Let a save end, even after an error; but not forever, as other ranks may have died."""
        if self._thread:
            self._thread.join(60)

    def restore(self, engine: Engine, say: Callable[[str], None]) -> Manifest | None:
        """Load the newest whole checkpoint, the same on every rank, and return its manifest.

        Returns None if there is no checkpoint. A damaged one is set aside and named through ``say``
        (on rank 0), and the one before it is tried.

        Raises:
            UserError: there are checkpoints and all are damaged, or one has a newer format.
        """
        if self._ranks.is_first:
            clean_up(self.folder)

        damage: dict[Checkpoint, str] = {}
        for checkpoint in self._ranks.broadcast(checkpoints(self.folder)):
            try:
                manifest = self._intact_manifest(checkpoint)
            except DamagedError as error:
                damage[checkpoint] = str(error)
                continue
            if self._ranks.is_first:
                _set_aside(damage, manifest.step, say)
            self._load(checkpoint, engine, manifest)
            self.last_step = manifest.step
            return manifest

        if damage:
            lines = [f"{checkpoint.path}: {reason}" for checkpoint, reason in damage.items()]
            lines.append(
                f"{self.folder}: holds no whole checkpoint; remove the folder to train from step 0"
            )
            raise self._ranks.failure("\n".join(lines))
        return None

    def save(self, engine: Engine, step: int, tokens: int) -> SaveOutcome | None:
        """Copy the state to the CPU and write it in the background, while training continues.

        Waits for a save that is still under way, and returns how that one ended. A step that is
        saved already is not saved again.
        """
        previous = self.poll(wait=True)
        if step != self.last_step:
            state = {name: shards.snapshot() for name, shards in engine.state().items()}
            self._outcome = None
            self._thread = threading.Thread(
                target=self._write,
                args=(state, step, tokens, engine.rank_layout),
                daemon=True,
                name="checkpoint",
            )
            self._thread.start()
        return previous

    def poll(self, wait: bool = False) -> SaveOutcome | None:
        """Return how the last save ended, once and only when it has on every rank; else None.

        ``wait`` waits for that end.
        """
        if not self._thread:
            return None
        if not wait and self._ranks.any(self._thread.is_alive()):
            return None
        self._thread.join()
        self._thread = None
        assert self._outcome is not None, (
            "the thread that writes checkpoints died; its error is above"
        )
        if not self._outcome.error:
            self.last_step = self._outcome.step
        return self._outcome

    def _intact_manifest(self, checkpoint: Checkpoint) -> Manifest:
        """Return the checkpoint's manifest if its files are what the manifest says.

        Each rank reads and hashes some of the files.

        Raises:
            DamagedError: the same on every rank.
            UserError: see :meth:`Checkpoint.manifest`.
        """
        manifest = damage = None
        with self._ranks.raise_on_all():
            if self._ranks.is_first:
                try:
                    manifest = checkpoint.manifest()
                except DamagedError as error:
                    damage = str(error)
        manifest, damage = self._ranks.broadcast((manifest, damage))
        if manifest is None:
            raise DamagedError(damage)

        damage_by_rank = self._ranks.gather(
            checkpoint.damage(manifest, dist.get_rank(), dist.get_world_size())
        )
        for damage in damage_by_rank:
            if damage:
                raise DamagedError(damage)
        return manifest

    def _load(self, checkpoint: Checkpoint, engine: Engine, manifest: Manifest) -> None:
        state = engine.state()
        if manifest.ranks != engine.rank_layout:
            # Random states belong to a rank. Other ranks keep those of the seed, and draw other
            # random numbers.
            state = {name: shards for name, shards in state.items() if not name.startswith("rng.")}
        reader = FileSystemReader(checkpoint.path)
        if LOSS_SCALE in state and LOSS_SCALE not in reader.read_metadata().state_dict_metadata:
            del state[LOSS_SCALE]  # training.dtype: auto had another meaning on another device
        try:
            dcp.load(state, storage_reader=reader, planner=LoadPlanner(), process_group=self._group)
        except CheckpointException as failed:
            raise self._ranks.failure(
                f"{checkpoint.path}: cannot be loaded: {_first_failure(failed)}"
            ) from None
        engine.load_state(state)

    def _write(self, state: dict[str, Shards], step: int, tokens: int, rank_layout: str) -> None:
        """Write a checkpoint, in the background thread of every rank, and note how that ended."""
        began = time.monotonic()
        partial = partial_path(self.folder, step)
        error = warning = None
        if self._gpu is not None:
            # A thread begins with GPU 0, where torch's writer would make a context for every rank.
            torch.cuda.set_device(self._gpu)
        try:
            files = self._write_files(state, partial)
            saved_at = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            manifest = Manifest(step, tokens, rank_layout, saved_at, files)
            self._on_all_ranks(lambda: commit(partial, manifest) if self._ranks.is_first else None)
        except CheckpointException as failed:
            # On a full disk torch says only that its file has not the length it should have: add
            # the space that is left.
            error = f"{_first_failure(failed)} ({_free_space(self.folder)})"
            if self._ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)

        # Old checkpoints go only now: a whole one exists at any time.
        if self._ranks.is_first and not error:
            try:
                prune(self.folder, self._keep)
            except OSError as failed:
                warning = f"old checkpoints cannot be removed: {failed}"
        self._outcome = SaveOutcome(step, time.monotonic() - began, error, warning)

    def _write_files(self, state: dict[str, Shards], partial: Path) -> dict[str, FileEntry]:
        """Write this rank's boxes; return the size and SHA-256 of the files of all ranks.

        Raises:
            CheckpointException: on every rank, if any of them failed.
        """
        dcp.save(
            state,
            # What is written lies in memory already: nothing is to be copied ahead.
            storage_writer=FileSystemWriter(partial, per_thread_copy_ahead=0),
            planner=SavePlanner(),
            process_group=self._group,
        )
        own_files = list(partial.glob(f"__{self._ranks.rank}_*"))
        if self._ranks.is_first:
            own_files.append(partial / ".metadata")
        entries_by_rank = self._on_all_ranks(
            lambda: {path.name: FileEntry(path.stat().st_size, sha256(path)) for path in own_files}
        )
        return {name: entry for entries in entries_by_rank for name, entry in entries.items()}

    def _on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Do the work on every rank and return all results, in rank order.

        For the background thread.

        Raises:
            CheckpointException: on every rank, if any of them failed; what DCP raises then, too.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        outcomes: list = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, error), group=self._group)

        failures = {
            rank: (failure, StackSummary())
            for rank, (_, failure) in enumerate(outcomes)
            if failure is not None
        }
        if failures:
            raise CheckpointException("save", failures)
        return [result for result, _ in outcomes]


def _set_aside(damage: dict[Checkpoint, str], step: int, say: Callable[[str], None]) -> None:
    """Rename damaged checkpoints, given with their damage; that of ``step`` is used instead."""
    for checkpoint, reason in damage.items():
        try:
            aside = f"set aside as {quarantine(checkpoint).name}"
        except OSError as error:
            aside = f"cannot be set aside ({error.strerror})"
        say(f"warning: {checkpoint.path}: {reason}; {aside}, resuming from step {step}")


def _first_failure(failed: CheckpointException) -> str:
    """Return one line about the first rank that failed."""
    rank, (error, _) = next(iter(failed.failures.items()))
    return f"rank {rank}: {(str(error) or repr(error)).splitlines()[0]}"


def _free_space(folder: Path) -> str:
    try:
        return f"the disk has {shutil.disk_usage(folder).free / 2**20:,.0f} MiB left"
    except OSError as error:
        return f"the space left on the disk is not known: {error.strerror}"
