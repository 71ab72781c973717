"""What one process of a run needs around it: a process group, a device, threads, memory."""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(threads: int, alone: bool = False) -> Iterator[None]:
    """The default process group: torchrun's where its variables are set, else or where ``alone`` of this process only."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(threads)
        keep_freed_memory()
    where = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone or not under_torchrun() else _rendezvous()
    dist.init_process_group("nccl" if cuda else "gloo", **where)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rendezvous() -> dict:
    """Torchrun's store under a name of this attempt: one that it restarts would find the addresses of ranks that are gone."""
    import torch.distributed as dist

    host, port, rank, world = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, int(port), int(world), is_master=not theirs and rank == "0", wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"longspan-{attempt}", store), "rank": int(rank), "world_size": int(world)}


def keep_freed_memory() -> None:
    """Let glibc keep what torch frees on the CPU for its next tensors.

    It gives large tensors back to the system at once, and the page faults of the next ones then cost a fifth of an attention.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # no other C library has it
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def quiet_libraries() -> None:
    """Megatron-core warns of CUDA packages that longspan does not use, and sets off torch's warnings about its own calls."""
    warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed.*")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*grad attribute of a Tensor that is not a leaf Tensor.*")
