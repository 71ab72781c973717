"""What one process of a run needs around it: a process group, a device, threads, memory."""

import ctypes
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4


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
    where = (
        {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if alone or not under_torchrun()
        else _rendezvous()
    )
    dist.init_process_group("nccl" if cuda else "gloo", **where)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rendezvous() -> dict:
    """Torchrun's store under a name of this attempt: in the store itself are still the addresses of ranks that are gone."""
    import torch.distributed as dist

    port, rank, world = (int(os.environ[name]) for name in ("MASTER_PORT", "RANK", "WORLD_SIZE"))
    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        world,
        is_master=not theirs and rank == 0,
        wait_for_workers=False,
    )
    return {
        "store": dist.PrefixStore(_attempt(store, rank, world), store),
        "rank": rank,
        "world_size": world,
    }


def _attempt(store, rank: int, world: int) -> str:
    """A name of the first rank's, which it tells the processes that are there now.

    How often an agent has restarted is no such name: one whose own ranks were well does not count it.
    """
    mine = uuid4().hex
    store.set(f"here/{rank}", mine)
    if rank:
        name = store.get(f"{mine}/attempt").decode()
        store.add(f"{name}/told", 1)
        return name
    places, told = [f"here/{other}" for other in range(1, world)], set()
    while (
        store.add(f"{mine}/told", 0) < world - 1
    ):  # what is read may still be of a process that is gone
        for other in {name.decode() for name in store.multi_get(places)} - told:
            store.set(f"{other}/attempt", mine)
            told.add(other)
        time.sleep(0.02)
    return mine


def host_memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
    warnings.filterwarnings(
        "ignore", message=".*is deprecated. Please use `torch.distributed.*", category=FutureWarning
    )
    warnings.filterwarnings(
        "ignore", message=".*grad attribute of a Tensor that is not a leaf Tensor.*"
    )
