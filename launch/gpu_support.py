"""What GPUs need of a machine besides packages, and what computes each mixer on the GPUs here."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_COMPILE_TIMEOUT_S = 120


def kernel_rows() -> tuple[list[tuple[str, str]], bool]:
    """Return what kernels for GPUs need and there is of it, and whether Triton compiles one."""
    from ..attention.gpu import torch_has_flash

    result, works = _compiled_kernel()
    rows = [
        ("C compiler", c_compiler()),
        ("Python.h", python_header()),
        ("Triton kernel", result),
        ("torch's flash-attn", "built in" if torch_has_flash() else "not in this build of torch"),
    ]
    return rows, works


def c_compiler() -> str:
    """Return the compiler that Triton takes, or what to do about none."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return found or "MISSING, Triton needs one on GPUs: install gcc, or set CC"


def python_header() -> str:
    """Return where the header of this Python is, or what to do about none."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.exists():
        return str(header)
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return f"MISSING, Triton needs it on GPUs: install {package}"


def _compiled_kernel() -> tuple[str, bool]:
    """Return what became of a kernel in a process of its own, and whether it was compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "longspan.launch.workers.compile_kernel"]
    try:
        worker = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"FAILED: not compiled after {_COMPILE_TIMEOUT_S} s", False
    lines = (worker.stdout if worker.returncode == 0 else worker.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit status {worker.returncode}"
    return (last, True) if worker.returncode == 0 else (f"FAILED: {last}", False)


def backend_rows(capabilities: list[int]) -> list[tuple[str, str]]:
    """Return by which backends GPUs of these compute capabilities compute which mixers.

    At usual sizes. Mixers share a row if the same backend computes them for the same reasons.
    """
    from ..trainer.predict.backends import mixer_backends

    rows = []
    for capability in dict.fromkeys(capabilities):
        kind = f"sm_{capability}" if capability else "AMD"
        mixers: dict[tuple[str, str], list[str]] = {}
        for each in mixer_backends(capability):
            speed = ", SLOW" if each.is_slow else ""
            because = f" ({each.reasons})" if each.reasons else ""
            mixers.setdefault((f"{each.backend}{speed}", because), []).append(each.block)
        for (backend, because), names in mixers.items():
            rows.append((f"{kind} {backend}", ", ".join(names) + because))
    return rows
