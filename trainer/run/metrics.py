"""Where numbers go: ``metrics.jsonl`` always, W&B and TensorBoard if the recipe asks for them."""

import json
import os
import uuid
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..checkpoint.run_folder import RunFolder
from ..errors import UserError
from ..recipe.schema import Recipe


class MetricsLog:
    """Writes one JSON object per record: ``{"step": 10, "train/loss": ...}``.

    A context manager; for rank 0 alone.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe):
        self._path = folder.metrics
        self._failed = False  # whether the last record was lost
        self._wandb = _start_wandb(folder.path, recipe) if recipe.metrics.wandb else None
        self._tensorboard = None
        if recipe.metrics.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder.path / "tensorboard"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a record.

        A full disk does not stop training: it is reported once, and the records are lost.
        """
        self._append(json.dumps({"step": step, **metrics}) + "\n")
        if self._wandb:
            self._wandb.log(metrics, step=step)
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def _append(self, line: str) -> None:
        # The disk may have taken a part of the last record: leave that on a line of its own.
        start = "\n" if self._failed else ""
        try:
            with self._path.open("a") as file:
                file.write(start + line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                print(
                    f"ALERT: {self._path} cannot be written: {error.strerror}; training continues",
                    flush=True,
                )
            self._failed = True

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        if self._wandb:
            self._wandb.finish(exit_code=0 if error_type is None else 1)
        if self._tensorboard:
            self._tensorboard.close()


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
    identity = folder / "wandb_id"  # a resumed run is the same run at W&B
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=recipe.metrics.wandb_project,
        name=folder.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(folder),
        config=recipe.model_dump(mode="json"),
        settings=settings,
    )


def _has_wandb_account() -> bool:
    """Return whether a key is set, or ``wandb login`` has left one in ``~/.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc().authenticators(host) is not None
    except (FileNotFoundError, NetrcParseError):
        return False
