"""Where numbers go: metrics.jsonl always, W&B and TensorBoard where the recipe asks for them."""

import json
import os
import uuid
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from ..checkpoint.run_folder import RunFolder
from ..errors import UserError
from ..recipe.schema import Recipe


class MetricsLog:
    """One JSON object per logged step: ``{"step": 10, "train/loss": ...}``. A context manager; for rank 0 alone."""

    def __init__(self, folder: RunFolder, recipe: Recipe):
        self._path, self._failed = folder.metrics, False
        self._wandb = _start_wandb(folder.path, recipe) if recipe.metrics.wandb else None
        self._tensorboard = None
        if recipe.metrics.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder.path / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """A disk that takes no more stops no training: it is told, and the record is lost."""
        line = json.dumps({"step": step, **values}) + "\n"
        try:
            with self._path.open("a") as file:
                file.write(
                    "\n" * self._failed + line
                )  # what was cut short before keeps a line of its own
            self._failed = False
        except OSError as error:
            if not self._failed:
                print(
                    f"ALERT: {self._path} cannot be written: {error.strerror}; training goes on",
                    flush=True,
                )
            self._failed = True
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error) -> None:
        if self._wandb:
            self._wandb.finish(exit_code=0 if error[0] is None else 1)
        if self._tensorboard:
            self._tensorboard.close()


def require_loggers(recipe: Recipe) -> None:
    """Before any process starts: W&B and TensorBoard are extras."""
    for name in ("wandb", "tensorboard"):
        if getattr(recipe.metrics, name) and find_spec(name) is None:
            raise UserError(
                f"metrics.{name}: the {name} package is missing; `pip install {name}` or set it to false"
            )


def _start_wandb(folder: Path, recipe: Recipe):
    """Online where there is an account, else offline: the files then lie in the run folder for `wandb sync`."""
    import wandb

    if not os.environ.get("WANDB_MODE") and not _has_wandb_account():
        os.environ["WANDB_MODE"] = "offline"
    settings = wandb.Settings(console="off", silent=True)
    identity = folder / "wandb_id"  # a run that goes on is the same run there
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
    """Whether a key is set, or `wandb login` has left one in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc().authenticators(host) is not None
    except (FileNotFoundError, NetrcParseError):
        return False
