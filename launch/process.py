"""What one process of a run needs around it: a process group, a device, threads."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(threads: int) -> Iterator[None]:
    """The default process group: torchrun's where its variables are set, else of this process alone."""
    _quiet_imports()
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(threads)
    alone = {} if under_torchrun() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _quiet_imports() -> None:
    """Megatron-core warns at import that optional CUDA packages are missing; longspan does not use them."""
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
