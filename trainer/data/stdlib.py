"""The embedded corpus: the sources of the Python standard library on this machine, without its tests.

Real text with structure at long range, on every machine that can run this program.
"""

import fcntl
import os
import platform
import sysconfig
import zlib
from pathlib import Path

from .build import build_corpus
from .corpus import files
from .tokenizer import Tokenizer

NAME = "python-stdlib"
_HELD_OUT = 48  # one file of so many
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def python_stdlib(tokenizer: Tokenizer) -> tuple[str, str]:
    """Prefixes of the training and the held-out split, built into the cache on first use."""
    cache = Path(
        os.environ.get("LONGSPAN_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "longspan"
    )
    identity = f"{tokenizer.identity.replace(':', '-')[:24]}-{platform.python_version()}-v1"
    cache = cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    prefixes = [str(cache / f"{NAME}-{identity}-{split}") for split in ("train", "held-out")]
    with cache.joinpath("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs, or two nodes on one home, build it once
        for prefix, held_out in zip(prefixes, (False, True), strict=True):
            if not all(path.exists() for path in files(prefix)):
                for partial in files(prefix):
                    partial.unlink(missing_ok=True)
                build_corpus(
                    _sources(held_out),
                    tokenizer,
                    prefix,
                    f"Building {NAME} ({'held-out' if held_out else 'train'})",
                )
    return prefixes[0], prefixes[1]


def _sources(held_out: bool) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    kept = [
        path
        for path in relative
        if not _LEFT_OUT.intersection(path.parts) and _is_text(root / path)
    ]
    return [
        root / path
        for path in kept
        if (zlib.crc32(path.as_posix().encode()) % _HELD_OUT == 0) == held_out
    ]


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text("utf-8").strip())
    except UnicodeDecodeError:
        return False
