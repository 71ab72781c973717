"""The checkpoints of a run as files: written whole or not at all, and checked before use.

``checkpoints/step-00000100/`` holds the files of torch's distributed checkpoint and
``manifest.json``, which has the size and SHA-256 of each. It is written under a name that ends in
``.partial`` and renamed when all of it is on the disk. Needs no torch.

What ``kill -9`` leaves, whenever it comes: before the rename, a ``.partial`` folder, which is never
read and which :func:`clean_up` removes at the next start; after it, a whole checkpoint. A removal
renames the folder to ``.partial`` first, so one that is cut short looks like an unfinished save.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

VERSION = 1
"""Version of the format of manifests; a newer one is refused."""
LOSS_SCALE = "optimizer.loss_scale"
"""Name of the tensor that only checkpoints of float16 runs have."""
_NAME = re.compile(r"step-(\d+)")


class DamagedError(Exception):
    """A checkpoint that cannot be used: which file, and what is wrong with it."""


class FileEntry(NamedTuple):
    """What a manifest says of a file."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    """Steps done."""
    tokens: int
    """Labels that counted in them."""
    ranks: str
    """How the ranks that wrote it were arranged: :attr:`Engine.rank_layout`."""
    saved_at: str
    """Local time, ISO 8601."""
    files: dict[str, FileEntry]
    """Every other file, by its name."""
    version: int = VERSION

    def to_json(self) -> str:
        """Return the file's contents, with a digest of them, so that a flipped bit is found."""
        content = asdict(self)
        return json.dumps({**content, "digest": _digest(content)}, indent=1)


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    path: Path
    step: int

    def manifest(self) -> Manifest:
        """Return the manifest, read and checked; the files that it names are not.

        Raises:
            DamagedError: naming the file.
            UserError: a newer longspan wrote it.
        """
        file = self.path / "manifest.json"
        try:
            content = json.loads(file.read_text())
            digest = content.pop("digest")
            version = int(content["version"])
        except OSError as error:
            raise DamagedError(f"{file.name}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DamagedError(f"{file.name} is not a manifest") from None
        if digest != _digest(content):
            raise DamagedError(f"{file.name} has changed since it was written (SHA-256 differs)")
        if version > VERSION:
            raise UserError(
                f"{self.path}: was written by a newer longspan (format {version}, this one reads "
                f"up to {VERSION}); upgrade longspan, or choose another run_dir"
            )
        files = {name: FileEntry(*entry) for name, entry in content.pop("files").items()}
        manifest = Manifest(**content, files=files)
        if manifest.step != self.step:
            raise DamagedError(f"{file.name} says step {manifest.step}")
        return manifest

    def damage(self, manifest: Manifest, share: int = 0, shares: int = 1) -> str | None:
        """Return what is wrong with the files, or None; each of this share is read and hashed.

        ``share`` of ``shares`` is every ``shares``-th file, so that ranks can check them together.
        """
        for name in sorted(manifest.files)[share::shares]:
            expected = manifest.files[name]
            try:
                size = (self.path / name).stat().st_size
                if size != expected.size:
                    return f"{name} has {size:,} bytes instead of {expected.size:,}"
                if sha256(self.path / name) != expected.sha256:
                    return f"{name} has changed since it was written (SHA-256 differs)"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the committed checkpoints in ``folder``, the newest first."""
    if not folder.is_dir():
        return []
    committed = []
    for path in folder.iterdir():
        if name := _NAME.fullmatch(path.name):
            committed.append(Checkpoint(path, int(name[1])))
    return sorted(committed, key=lambda checkpoint: -checkpoint.step)


def partial_path(folder: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of a step is written."""
    return checkpoint_path(folder, step).with_suffix(".partial")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the whole checkpoint of a step."""
    return folder / f"step-{step:08}"


def commit(partial: Path, manifest: Manifest) -> None:
    """Write the manifest, flush it to the disk and give the checkpoint its name.

    The rename is what makes it a checkpoint. The writer of the tensors has flushed their files.
    """
    with (partial / "manifest.json").open("w") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    _flush(partial)
    partial.rename(partial.with_suffix(""))
    _flush(partial.parent)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints; 0 keeps all."""
    for old in checkpoints(folder)[keep:] if keep else ():
        # Rename first: what a removal that is cut short leaves must not look like a checkpoint.
        partial = old.path.with_suffix(".partial")
        old.path.rename(partial)
        shutil.rmtree(partial)


def clean_up(folder: Path) -> None:
    """Remove what a save or a removal that was cut short has left, and whatever has such a name.

    What cannot be removed stays: a checkpoint is what its manifest says.
    """
    for leftover in folder.glob("step-*.partial"):
        with contextlib.suppress(OSError):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def quarantine(checkpoint: Checkpoint) -> Path:
    """Rename a damaged checkpoint, so that it is neither used nor overwritten."""
    for number in range(1, 1000):
        target = checkpoint.path.with_suffix(f".damaged-{number}")
        if not target.exists():
            return checkpoint.path.rename(target)
    raise UserError(
        f"{checkpoint.path.parent}: holds a thousand damaged checkpoints; "
        "check the disk, and remove them"
    )


def sha256(path: Path) -> str:
    """Return the digest of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Description(NamedTuple):
    """A checkpoint and its condition."""

    checkpoint: Checkpoint
    manifest: Manifest | None
    """None if it cannot be read."""
    damage: str | None
    """What is wrong with the checkpoint; None if it is whole."""


def describe(folder: Path) -> Iterator[Description]:
    """Yield every checkpoint in ``folder`` with its condition, the newest first."""
    for checkpoint in checkpoints(folder):
        try:
            manifest = checkpoint.manifest()
        except (DamagedError, UserError) as error:
            yield Description(checkpoint, None, str(error))
            continue
        yield Description(checkpoint, manifest, checkpoint.damage(manifest))


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    """Wait until the disk has the names of the files in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
