"""The embedded corpus: this machine's Python standard library, without its tests.

It is real text with structure at long range, on every machine that can run this program.
"""

import contextlib
import os
import platform
import sysconfig
import zlib
from pathlib import Path

from ..file_locks import NoLocksError, lock_file
from .build import build_corpus
from .corpus_files import corpus_files
from .tokenizer import Tokenizer

PYTHON_STDLIB = "python-stdlib"
"""The corpus's name in a recipe, in the place of a prefix."""

_HELD_OUT_ONE_IN = 48  # files
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def python_stdlib(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the prefixes of the training and the held-out split; build them on first use.

    The cache is ``$LONGSPAN_CACHE``, or else ``longspan`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    cache = _cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    identity = f"{tokenizer.identity.replace(':', '-')[:24]}-{platform.python_version()}-v1"
    training = str(cache / f"{PYTHON_STDLIB}-{identity}-train")
    held_out = str(cache / f"{PYTHON_STDLIB}-{identity}-held-out")
    if _is_built(training) and _is_built(held_out):
        return training, held_out
    with cache.joinpath("lock").open("w") as lock:
        # Two first runs, or two nodes that share a home folder, build it once; without locks, each
        # of them does.
        with contextlib.suppress(NoLocksError):
            lock_file(lock, wait=True)
        _build_if_missing(training, "train", tokenizer)
        _build_if_missing(held_out, "held-out", tokenizer)
    return training, held_out


def _cache_folder() -> Path:
    folder = os.environ.get("LONGSPAN_CACHE")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "longspan").expanduser()


def _is_built(prefix: str) -> bool:
    return all(path.exists() for path in corpus_files(prefix))


def _build_if_missing(prefix: str, split: str, tokenizer: Tokenizer) -> None:
    if _is_built(prefix):
        return
    for partial in corpus_files(prefix):
        partial.unlink(missing_ok=True)
    files = _source_files(held_out=split == "held-out")
    build_corpus(files, tokenizer, prefix, f"Building {PYTHON_STDLIB} ({split})")


def _source_files(held_out: bool) -> list[Path]:
    """Return the files of a split, by name. A file's path decides which split it is in."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        if _SKIPPED_FOLDERS.intersection(path.parts) or not _is_text(root / path):
            continue
        is_held_out = zlib.crc32(path.as_posix().encode()) % _HELD_OUT_ONE_IN == 0
        if is_held_out == held_out:
            files.append(root / path)
    return files


def _is_text(path: Path) -> bool:
    """Tell whether a file is UTF-8 and more than white space."""
    try:
        return bool(path.read_text("utf-8").strip())
    except UnicodeDecodeError:
        return False
