"""``longspan doctor``: show what this machine has for training, and what it lacks."""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from ...trainer.versions import unsupported, version_of
from ..gpu_support import backend_rows, kernel_rows
from ..options import user_path
from ..process import host_memory
from ..ranks import run_ranks
from ..table import Column, table

REQUIRED = ("torch", "megatron-core", "deepspeed", "transformers", "triton", "numpy")
OPTIONAL = {
    "flash-attn": "causal attention and windows run on longspan's Triton kernels instead",
    "flash-linear-attention": "linear attention runs on longspan's Triton kernels instead",
    "wandb": "metrics.wandb is refused",
    "tensorboard": "metrics.tensorboard is refused",
    "pyarrow": "data build cannot read .parquet",
}
"""Packages, and what their absence costs."""
UNUSED = {"transformer-engine": "transformer_engine", "apex": "apex"}
"""Packages of NVIDIA's images, and their modules, that change nothing here."""

_DISK_BYTES = 64 * 2**20  # that are written to the disk to measure it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=user_path,
        default="runs",
        metavar="DIR",
        help="where runs are kept (default runs)",
    )


def run(options: argparse.Namespace) -> int:
    return doctor(options.folder)


def doctor(folder: str) -> int:
    """Print what is there, and measure the disk of ``folder`` and the messages between ranks.

    Returns:
        The exit status: 0 if a recipe can be trained here, else 1.
    """
    missing = [name for name in REQUIRED if version_of(name) is None]
    print(_table([(name, version_of(name) or "MISSING") for name in ("python", *REQUIRED)]))
    optional = [
        (name, version_of(name) or f"not installed: {cost}") for name, cost in OPTIONAL.items()
    ]
    unused = [
        (name, f"{version_of(name) or 'installed'}, which longspan does not use")
        for name, module in UNUSED.items()
        if find_spec(module)
    ]
    print(f"\n{_table([*optional, *unused])}\n")
    if missing:
        print(f"cannot train without {', '.join(missing)}: pip install {' '.join(missing)}")
        return 1
    if problems := unsupported("python", *REQUIRED):
        print("\n".join(["cannot train with what is installed:", *problems]))
        return 1

    import torch

    from ...attention.gpu import compute_capability

    num_gpus = torch.cuda.device_count()
    print(_table([*_hardware(num_gpus), ("disk", _disk(Path(folder)))]), flush=True)
    rows, compiles = kernel_rows()
    print(f"\n{_table(rows)}", flush=True)
    if num_gpus:
        gpus = [torch.device("cuda", number) for number in range(num_gpus)]
        print(f"\n{_table(backend_rows(list(map(compute_capability, gpus))))}", flush=True)
        if not compiles:
            print("\ncannot train on the GPUs: Triton compiles no kernel for them")
            return 1

    num_ranks = num_gpus or min(2, os.cpu_count() or 1)
    if num_ranks < 2:
        print("\none device: nothing to measure between ranks")
        return 0
    print()
    return run_ranks([sys.executable, "-m", "longspan.launch.workers.all_to_all"], num_ranks, 1)


def _hardware(num_gpus: int) -> list[tuple[str, str]]:
    import torch

    rows = [
        ("cores", f"{os.cpu_count()}, {platform.machine()}"),
        ("memory", f"{host_memory() / 2**30:.1f} GiB"),
    ]
    if not num_gpus:
        reason = "training runs on the CPU, over gloo, in fp32 (training.dtype: auto)"
        return [*rows, ("GPU", f"none: {reason}")]

    for number in range(num_gpus):
        gpu = torch.cuda.get_device_properties(number)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        size = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {number}", f"{gpu.name}, {size}, {capability}"))
    return [*rows, ("NCCL", ".".join(map(str, torch.cuda.nccl.version())))]


def _table(rows: list[tuple[str, str]]) -> str:
    return table(rows, [Column("left"), Column("left")])


def _disk(folder: Path) -> str:
    """Return what is free on a folder's disk, and how fast a checkpoint would be written there."""
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()
    )
    free = shutil.disk_usage(existing).free
    if free < 2 * _DISK_BYTES:
        return f"{existing}: {free / 2**20:,.0f} MiB free, TOO LITTLE"
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            began = time.perf_counter()
            file.write(os.urandom(_DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
            speed = _DISK_BYTES / (time.perf_counter() - began) / 1e6
    except OSError as error:
        return f"{existing}: cannot be written: {error.strerror}"
    return f"{existing}: {free / 2**30:,.1f} GiB free, {speed:,.0f} MB/s written to the disk"
