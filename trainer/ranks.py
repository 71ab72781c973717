"""Decisions that all ranks take together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .errors import UserError


class RankGroup:
    """A gloo group beside the engine's own, so that agreeing on a flag never waits for a GPU."""

    def __init__(self):
        self._group = dist.new_group(backend="gloo")

    def any(self, flag: bool) -> bool:
        """Whether any rank raises the flag. Every rank must ask, at the same place."""
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return bool(raised)

    def gather(self, value: object) -> list:
        """Every rank's value, on every rank, in rank order."""
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: object) -> object:
        """The first rank's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def broadcast_tensor(self, value: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """The first rank's fp32 tensor, on every rank."""
        tensor = torch.empty(shape) if value is None else value.contiguous()
        dist.broadcast(tensor, src=0, group=self._group)
        return tensor

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """What is raised inside on some ranks, as for bad input, ends all of them here; the others have no message."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.any(error is not None):
            raise error or UserError()
