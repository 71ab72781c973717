"""What a process of longspan needs around it: an exit status, a process group, threads, memory."""

import ctypes
import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from ..trainer.errors import SilentRankError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command, and return its exit status (0 for None) or that of the error that ended it.

    The problems of a ``UserError`` are printed to stderr, one a line; of a ``SilentRankError``
    nothing is printed, since another rank has the message. A file that cannot be read or written is
    a problem as well. Other errors pass, and end Python with a traceback and status 1.
    """
    try:
        return command() or 0
    except SilentRankError as error:
        return error.exit_status
    except UserError as error:
        _print_problems(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return 130  # as a shell reports a command that SIGINT ended
    except BrokenPipeError:  # the output goes to `head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _FULL_DISK and error.filename is None:
            raise
        _print_problems(f"{error.filename or 'the disk'}: {error.strerror}")
        return UserError.exit_status


_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _print_problems(message: str) -> None:
    """Print one line for each problem to stderr."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    lines = [f"longspan: {rank}{line}\n" for line in message.splitlines()]
    print("".join(lines), file=sys.stderr, end="", flush=True)  # at once: ranks share stderr


def under_torchrun() -> bool:
    """Return whether this process is a rank, started by torchrun or by ``ranks.run_ranks``."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(threads: int, alone: bool = False, timeout_s: float = 1800.0) -> Iterator[None]:
    """Make the default process group, over NCCL with CUDA, else over gloo.

    It holds all ranks if this process is one of them, else this process alone.

    Args:
        threads: of torch, on a CPU.
        alone: hold only this process, though it is a rank.
        timeout_s: seconds after which a collective that other ranks do not join ends the process.
    """
    import torch
    import torch.distributed as dist

    device = None
    if torch.cuda.is_available():
        # Told which GPU it has, NCCL connects the ranks now and not within the first step, and
        # barriers do not guess.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        _prepare_gpu()
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads)
        keep_freed_memory()

    rank = 0
    world_size = 1
    store: Store = dist.HashStore()
    if under_torchrun() and not alone:
        rank = int(os.environ["RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
        store = _rendezvous_store(rank, world_size)
    dist.init_process_group(
        "nccl" if device else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _prepare_gpu() -> None:
    """Set what must be set before the GPU is first used, whoever has started this process."""
    import torch

    # Kernels start in the order in which they are launched: Megatron relies on it to hide messages.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # NVIDIA's images let products of fp32 be rounded to TF32, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    torch.set_float32_matmul_precision("highest")


def _rendezvous_store(rank: int, world_size: int) -> "Store":
    """Return torchrun's store under a prefix of this attempt.

    Ranks of an earlier attempt, which are gone, have left their addresses in the store; the prefix
    keeps them apart.
    """
    import torch.distributed as dist

    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=not agent_has_store and rank == 0,
        wait_for_workers=False,
    )
    return dist.PrefixStore(_attempt_name(store, rank, world_size), store)


def _attempt_name(store: "Store", rank: int, world_size: int) -> str:
    """Return a name that only the processes of this attempt share, made by rank 0.

    The number of restarts that an agent counts is no such name: an agent whose own ranks were well
    does not count one.

    In the store, every process writes a name of its own to ``here/RANK``; rank 0 writes its name,
    which is that of the attempt, to ``NAME/attempt`` for the name of every other rank. A rank that
    has read it adds 1 to ``ATTEMPT/told``, for which rank 0 waits: what it read in ``here/RANK``
    may still be the name of a process that is gone.
    """
    own_name = uuid4().hex
    store.set(f"here/{rank}", own_name)
    if rank != 0:
        attempt = store.get(f"{own_name}/attempt").decode()
        store.add(f"{attempt}/told", 1)
        return attempt

    keys = [f"here/{other}" for other in range(1, world_size)]
    answered: set[str] = set()
    while store.add(f"{own_name}/told", 0) < world_size - 1:
        names = {name.decode() for name in store.multi_get(keys)}
        for name in names - answered:
            store.set(f"{name}/attempt", own_name)
        answered |= names
        time.sleep(0.02)
    return own_name


def host_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let glibc keep the memory that torch frees on the CPU for its next tensors.

    By default it gives large tensors back to the system at once, and the page faults of the next
    ones then cost a fifth of an attention's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def quiet_libraries() -> None:
    """Hide warnings that a user cannot act on.

    Megatron-core warns of CUDA packages that longspan does not use, and causes torch's warnings
    about its own calls.
    """
    warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed.*")
    warnings.filterwarnings(
        "ignore", message=".*is deprecated. Please use `torch.distributed.*", category=FutureWarning
    )
    warnings.filterwarnings(
        "ignore", message=".*grad attribute of a Tensor that is not a leaf Tensor.*"
    )
