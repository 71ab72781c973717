"""A process group of any size, of which only this rank is there."""

from typing import Any, cast

import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from .recorder import Recorder

_IGNORED_OPTIONS = ("backend", "device_id", "group_desc", "pg_options", "timeout")
"""Options of groups that mean nothing to a fake one."""


def pretend_ranks(rank: int, world_size: int, recorder: Recorder) -> None:
    """Make the default process group of ``world_size`` ranks, as one of them, for good.

    Collectives send nothing, and are recorded. Objects come back as if all ranks had sent this
    one's.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    make_group = dist.new_group

    def new_group(*args: Any, **options: Any) -> Any:
        kept = {key: value for key, value in options.items() if key not in _IGNORED_OPTIONS}
        return make_group(*args, **kept)

    def all_gather_object(objects: list, own: Any, group: Any = None) -> None:
        recorder.wait("object sent to all ranks")
        objects[:] = [own] * len(objects)

    modules: list[Any] = [dist, dist.distributed_c10d]
    for module in modules:
        module.new_group = new_group
        module.all_gather_object = all_gather_object
        module.broadcast_object_list = lambda *_, **__: None
        # What is asked of a group's backend is whether a look at a result waits for the GPU.
        module.get_backend = lambda group=None: "nccl"
    _follow_handles(recorder)


_METHODS = (
    "allreduce",
    "_allgather_base",
    "allgather",
    "_reduce_scatter_base",
    "reduce_scatter",
    "alltoall_base",
    "alltoall",
    "broadcast",
    "reduce",
    "send",
    "recv",
    "allgather_into_tensor_coalesced",
    "reduce_scatter_tensor_coalesced",
)
"""Methods of a process group that start a collective and return its handle."""


def _follow_handles(recorder: Recorder) -> None:
    """Tell the recorder which collective a handle is of, and when it is waited for."""

    def followed(method: Any) -> Any:
        def start(*args: Any, **options: Any) -> Any:
            work = method(*args, **options)
            if work is not None:
                recorder.work_began(work)
            return work

        return start

    for name in _METHODS:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, followed(getattr(dist.ProcessGroup, name)))

    def awaited(work: Any, *_: Any, **__: Any) -> bool:
        recorder.work_awaited(work)
        return True

    for kind in (dist.distributed_c10d.Work, FakeWork):
        cast(Any, kind).wait = awaited
