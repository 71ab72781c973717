"""Where numbers go: ``metrics.jsonl`` always, W&B and TensorBoard if the recipe asks for them.

None of them stops a run: what cannot be written is lost, and an ``ALERT`` says so once.
"""

import errno
import io
import json
import os
import shutil
import socket
import time
import uuid
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..checkpoint.run_folder import RunFolder
from ..errors import UserError
from ..recipe.schema import Recipe
from .display import print_line


class Destination(Protocol):
    """A place where records are kept."""

    name: str
    """As an ``ALERT`` names it."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a record, or raise; the record is lost then."""

    def close(self, succeeded: bool) -> None:
        """Say that the run has ended."""


class MetricsLog:
    """Writes one JSON object per record: ``{"step": 10, "train/loss": ...}``.

    A context manager; for rank 0 alone. A step that is taken again after a crash is in each place
    once.

    Args:
        steps_done: of the checkpoint that the run resumes from; later steps are taken again.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, steps_done: int):
        self._destinations: list[Destination] = [JsonLines(folder.metrics)]
        if recipe.metrics.wandb:
            self._destinations.append(WeightsAndBiases(folder, recipe))
        if recipe.metrics.tensorboard:
            self._destinations.append(TensorBoard(folder.path / "tensorboard", steps_done + 1))
        self._failed: set[str] = set()  # names of those that lost the last record

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a record everywhere.

        A full disk does not stop training, nor does anything else that is wrong with a place: it
        is reported once, and the records are lost.
        """
        for destination in self._destinations:
            try:
                destination.write(step, metrics)
            except Exception as error:  # packages of others, with errors of their own
                if destination.name not in self._failed:
                    print_line(
                        f"ALERT: {destination.name} cannot be written: {_one_line(error)}; "
                        "training continues"
                    )
                self._failed.add(destination.name)
            else:
                self._failed.discard(destination.name)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        for destination in self._destinations:
            try:
                destination.close(succeeded=error_type is None)
            except Exception as error:
                print_line(f"ALERT: {destination.name} cannot be closed: {_one_line(error)}")


class JsonLines:
    """``metrics.jsonl``, a record a line."""

    def __init__(self, path: Path):
        self.name = str(path)
        self._path = path
        self._failed = False  # whether the last record was lost

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # The disk may have taken a part of the last record: leave that on a line of its own.
        start = "\n" if self._failed else ""
        self._failed = True
        with self._path.open("a") as file:
            file.write(start + json.dumps({"step": step, **metrics}) + "\n")
        self._failed = False

    def close(self, succeeded: bool) -> None:
        """Do nothing: no file is open between records."""


class TensorBoard:
    """A file of TensorBoard's events for each start of the run.

    Written without its ``SummaryWriter``, whose thread ends with a traceback where the disk is
    full, and with it all that it would write later.

    Args:
        folder: of the files of all starts.
        first_step: what earlier starts say of this step and of later ones does not count.
    """

    def __init__(self, folder: Path, first_step: int):
        self.name = f"{folder}/"
        self._folder = folder
        self._first_step = first_step
        self._path: Path | None = None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        events = [{"step": step, "summary": Summary(value=values)}]
        if self._path is None:
            events = [*self._opening_events(), *events]
        self._append(self._path or self._new_path(), events)

    def close(self, succeeded: bool) -> None:
        """Do nothing: no file is open between records."""

    def _opening_events(self) -> list[dict]:
        """Return what a file begins with: its format, and from which step on it replaces others."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        return [
            {"file_version": "brain.Event:2"},
            {"step": self._first_step, "session_log": SessionLog(status=SessionLog.START)},
        ]

    def _new_path(self) -> Path:
        # TensorBoard reads the files of a folder in the order of their names.
        unique = f"{socket.gethostname()}.{os.getpid()}"
        return self._folder / f"events.out.tfevents.{int(time.time()):010}.{unique}.0"

    def _append(self, path: Path, events: list[dict]) -> None:
        """Write all events, or none: no reader gets past half of one."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(Event(wall_time=time.time(), **event).SerializeToString())

        self._folder.mkdir(exist_ok=True)
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(content.getvalue()) != content.tell():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
        self._path = path


class WeightsAndBiases:
    """A run at W&B: online if there is an account, else offline.

    Offline, the files wait in the run folder for ``wandb sync``. What was logged just before a
    crash may not have come to W&B or to these files: a start logs again what is missing there, from
    the run's own records.
    """

    name = "W&B"

    def __init__(self, folder: RunFolder, recipe: Recipe):
        self._folder = folder
        self._recipe = recipe
        self._run: Any = None
        self._first_missing = 0
        self._start_error: Exception | None = None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._run is None:
            self._start(step)
        if step >= self._first_missing:
            self._run.log(metrics, step=step)

    def close(self, succeeded: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if succeeded else 1)

    def _start(self, step: int) -> None:
        """Start the run, and log the records of earlier steps that it lacks.

        Raises:
            Exception: what W&B raises; the same again without another try, which takes minutes if
                its server cannot be reached.
        """
        if self._start_error:
            raise self._start_error
        try:
            run = _start_wandb(self._folder.path, self._recipe)
        except Exception as error:
            self._start_error = error
            raise
        self._first_missing = run.step  # after the last one that the server has; 0 offline
        for record in self._folder.read_metrics():
            if self._first_missing <= record["step"] < step:
                values = {name: value for name, value in record.items() if name != "step"}
                run.log(values, step=record["step"])
        self._run = run


def require_loggers(recipe: Recipe) -> None:
    """Check that W&B and TensorBoard are installed if the recipe wants them.

    They are extras; called before any process starts.

    Raises:
        UserError: naming the package that is missing.
    """
    for name in ("wandb", "tensorboard"):
        if getattr(recipe.metrics, name) and find_spec(name) is None:
            raise UserError(
                f"metrics.{name}: the {name} package is missing; "
                f"`pip install {name}` or set it to false"
            )


def _start_wandb(folder: Path, recipe: Recipe) -> Any:
    """Start a W&B run: online if there is an account, else offline.

    Offline, the files wait in the run folder for ``wandb sync``.
    """
    import wandb

    if not os.environ.get("WANDB_MODE") and not _has_wandb_account():
        os.environ["WANDB_MODE"] = "offline"
    settings = wandb.Settings(console="off", silent=True)
    identity = _wandb_identity(folder)
    _remove_unfinished(folder, identity)
    return wandb.init(
        project=recipe.metrics.wandb_project,
        name=folder.name,
        id=identity,
        resume="allow",
        dir=str(folder),
        config=recipe.model_dump(mode="json"),
        settings=settings,
    )


def _wandb_identity(folder: Path) -> str:
    """Return the name of the run at W&B, which is the same after a resume."""
    file = folder / "wandb_id"
    identity = file.read_text().strip() if file.exists() else ""
    if not identity:
        identity = uuid.uuid4().hex
        file.write_text(identity)
    return identity


def _remove_unfinished(folder: Path, identity: str) -> None:
    """Remove the files of earlier offline starts that were not synced: this start logs all again.

    Both together would show steps twice.
    """
    for files in (folder / "wandb").glob(f"offline-run-*-{identity}"):
        if not list(files.glob("*.synced")):
            shutil.rmtree(files, ignore_errors=True)


def _one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def _has_wandb_account() -> bool:
    """Return whether a key is set, or ``wandb login`` has left one in ``~/.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc().authenticators(host) is not None
    except (FileNotFoundError, NetrcParseError):
        return False
