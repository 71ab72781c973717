"""The checkpoints of a run as files: written whole or not at all, and checked before they are used. Needs no torch.

``checkpoints/step-00000100/`` holds the files of torch's distributed checkpoint and ``manifest.json``, which has the size and
SHA-256 of each. It is written under a name that ends in ``.partial`` and renamed when all of it is on the disk.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UserError

VERSION = 1
_NAME = re.compile(r"step-(\d+)")


class DamagedError(Exception):
    """A checkpoint that cannot be used: which file, and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Steps done."""
    tokens: int
    """Labels that counted in them."""
    ranks: str
    """How the ranks were arranged that wrote it."""
    saved_at: str
    """Local time, ISO 8601."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and SHA-256 of every other file."""
    version: int = VERSION

    def to_json(self) -> str:
        """With a digest of the rest, so that a flipped bit is found here as well."""
        content = asdict(self)
        return json.dumps({**content, "digest": _digest(content)}, indent=1)


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    path: Path
    step: int

    def manifest(self) -> Manifest:
        """Read and checked as far as it goes by itself.

        Raises:
            DamagedError: naming the file.
            UserError: where a newer longspan wrote it.
        """
        file = self.path / "manifest.json"
        try:
            content = json.loads(file.read_text())
            digest, version = content.pop("digest"), int(content["version"])
        except OSError as error:
            raise DamagedError(f"{file.name}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DamagedError(f"{file.name} is not a manifest") from None
        if digest != _digest(content):
            raise DamagedError(f"{file.name} has changed since it was written (SHA-256 differs)")
        if version > VERSION:
            raise UserError(
                f"{self.path}: was written by a newer longspan (format {version}, this one reads up to {VERSION}); "
                "upgrade longspan, or choose another run_dir"
            )
        manifest = Manifest(**content)
        if manifest.step != self.step:
            raise DamagedError(f"{file.name} says step {manifest.step}")
        return manifest

    def damage(self, manifest: Manifest, share: int = 0, shares: int = 1) -> str | None:
        """What is wrong with the files, or with every ``shares``-th of them: each is read and hashed."""
        for name in sorted(manifest.files)[share::shares]:
            size, digest = manifest.files[name]
            try:
                found = (self.path / name).stat().st_size
                if found != size:
                    return f"{name} has {found:,} bytes instead of {size:,}"
                if sha256(self.path / name) != digest:
                    return f"{name} has changed since it was written (SHA-256 differs)"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The committed checkpoints in ``folder``, the newest first."""
    names = [
        (path, _NAME.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ())
    ]
    return sorted(
        (Checkpoint(path, int(name[1])) for path, name in names if name), key=lambda c: -c.step
    )


def partial_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f"step-{step:08}.partial"


def commit(partial: Path, manifest: Manifest) -> None:
    """Write the manifest, flush everything to the disk and give the checkpoint its name."""
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
        # Renamed first: what is left of a removal that was cut short must not look like a checkpoint.
        doomed = old.path.with_suffix(".partial")
        old.path.rename(doomed)
        shutil.rmtree(doomed)


def clean_up(folder: Path) -> None:
    """Remove what a save or a removal that was cut short left behind."""
    for leftover in folder.glob("step-*.partial"):
        shutil.rmtree(leftover)


def quarantine(checkpoint: Checkpoint) -> Path:
    """Rename a damaged checkpoint so that it is neither used nor overwritten."""
    for number in range(1, 1000):
        target = checkpoint.path.with_suffix(f".damaged-{number}")
        if not target.exists():
            return checkpoint.path.rename(target)
    raise UserError(
        f"{checkpoint.path.parent}: holds a thousand damaged checkpoints; look into the disk, and remove them"
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> Iterator[tuple[Checkpoint, Manifest | None, str | None]]:
    """Every checkpoint with its manifest and what is wrong with it, the newest first."""
    for checkpoint in checkpoints(folder):
        manifest = None
        try:
            manifest = checkpoint.manifest()
            yield checkpoint, manifest, checkpoint.damage(manifest)
        except (DamagedError, UserError) as error:
            yield checkpoint, manifest, str(error)


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
