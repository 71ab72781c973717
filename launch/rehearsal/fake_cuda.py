"""Makes torch believe in a CUDA device; see ``fake_cuda.cpp``.

To be called before torch is imported: torch asks for its CUDA hooks once.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ...trainer.errors import UserError

_SOURCE = Path(__file__).with_suffix(".cpp")


def install_fake_cuda() -> None:
    """Load the fake device into this process, compiling it first if that was never done.

    Raises:
        UserError: there is no C++ compiler, or it fails.
    """
    assert "torch" not in sys.modules, "the fake device comes before torch"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there stays out of it
    torch_folder = _torch_folder()
    library = _compiled(torch_folder)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    fake = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import torch  # noqa: F401

    fake.install_fake_guard()


def _torch_folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _compiled(torch_folder: Path) -> Path:
    """Return the compiled library for this source and this torch."""
    digest = hashlib.sha256(_SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"
    library = cache / f"fake_cuda-{digest}.so"
    if library.exists():
        return library

    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if compiler is None:
        raise UserError(
            "rehearse: needs a C++ compiler once, for the device that stands for a GPU; "
            "install g++, or set CXX"
        )
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f"{library.name}.{os.getpid()}"
    include = torch_folder / "include"
    command = [
        compiler, "-O1", "-shared", "-fPIC", "-std=c++20",
        f"-I{include}", f"-I{include}/torch/csrc/api/include",
        str(_SOURCE), "-o", str(unfinished),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        reason = next(iter(errors), f"status {result.returncode}")
        raise UserError(f"rehearse: {compiler} cannot compile the fake device: {reason}")
    unfinished.replace(library)  # at once, as others may be compiling it too
    return library
