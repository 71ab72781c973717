"""``longspan doctor``: what this machine has for training, what it lacks and what that costs, and how fast it moves bytes."""

import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from ...trainer.versions import version_of
from ..process import host_memory, process_group
from ..ranks import run_ranks

NEEDED = ("torch", "megatron-core", "deepspeed", "transformers", "triton", "numpy")
OPTIONAL = {
    "flash-attn": "causal attention and windows run on longspan's Triton kernels instead",
    "flash-linear-attention": "the delta rule and decays of each key run in torch on GPUs, several times slower",
    "wandb": "metrics.wandb is refused",
    "tensorboard": "metrics.tensorboard is refused",
    "pyarrow": "data build takes no .parquet",
}
BYTES = 64 * 2**20
"""That ranks send one another, and that are written to the disk, at a time."""


def doctor(folder: str) -> int:
    """Print it, and measure; ``folder`` is where runs are kept. 0 where a recipe can be trained."""
    lacking = [name for name in NEEDED if version_of(name) is None]
    print(_lines([(name, version_of(name) or "MISSING") for name in ("python", *NEEDED)]))
    costs = [(name, version_of(name) or f"not there: {cost}") for name, cost in OPTIONAL.items()]
    print(f"\n{_lines(costs)}\n")
    if lacking:
        print(f"cannot train without {', '.join(lacking)}: pip install {' '.join(lacking)}")
        return 1
    import torch

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    rows = [
        ("cores", f"{os.cpu_count()}, {platform.machine()}"),
        ("memory", f"{host_memory() / 2**30:.1f} GiB"),
    ]
    rows += [
        (f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        for number, gpu in enumerate(gpus)
    ]
    if gpus:
        rows.append(("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        rows.append(
            ("GPU", "none: training runs on the CPU, over gloo, in fp32 (training.dtype: auto)")
        )
    rows.append(("disk", _disk(Path(folder))))
    print(_lines(rows), flush=True)
    ranks = len(gpus) or min(2, os.cpu_count() or 1)
    if ranks < 2:
        print("\none device: nothing to measure between ranks")
        return 0
    print()
    return run_ranks([sys.executable, "-m", "longspan", "doctor", "--between-ranks"], ranks, 1)


def between_ranks() -> int:
    """As one of several ranks: what each sends to all others a second."""
    with process_group(1):
        import torch
        import torch.distributed as dist

        device = "cuda" if torch.cuda.is_available() else "cpu"
        count = dist.get_world_size()
        sent = torch.ones(BYTES // 4 // count * count, device=device)
        received, seconds = torch.empty_like(sent), []
        for _ in range(6):
            dist.barrier()
            began = time.perf_counter()
            dist.all_to_all_single(received, sent)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            moved = BYTES * (count - 1) / count
            speed = moved / sorted(seconds[1:])[2] / 1e9
            print(
                f"between {count} ranks over {dist.get_backend()}: {speed:.2f} GB/s out of each, all at once (all-to-all)"
            )
    return 0


def _lines(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {what}" for name, what in rows)


def _disk(folder: Path) -> str:
    """Of the nearest folder that exists: what is free, and how fast a checkpoint would be written."""
    where = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(where).free
    if free < 2 * BYTES:
        return f"{where}: {free / 2**20:,.0f} MiB free, TOO LITTLE"
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            began = time.perf_counter()
            file.write(os.urandom(BYTES))
            file.flush()
            os.fsync(file.fileno())
            speed = BYTES / (time.perf_counter() - began) / 1e6
    except OSError as error:
        return f"{where}: cannot be written: {error.strerror}"
    return f"{where}: {free / 2**30:,.1f} GiB free, {speed:,.0f} MB/s written through"
