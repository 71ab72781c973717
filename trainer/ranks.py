"""Decisions that all ranks take together."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import SilentRankError, UserError

T = TypeVar("T")


class RankGroup:
    """All ranks of the run, for agreeing on small values.

    The group is a gloo group beside the engine's own, so that agreeing on a flag never waits for a
    GPU.

    Apart from :meth:`failure`, every method is a collective: all ranks must call it, in the same
    order.

    Args:
        timeout_s: seconds after which an agreement that other ranks do not join ends the process.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self.timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.rank = dist.get_rank()
        self.is_first = self.rank == 0
        """Whether this is rank 0, which speaks for all of them."""

    def any(self, flag: bool) -> bool:
        """Return whether any rank raises the flag."""
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return bool(raised)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def broadcast_tensor(self, value: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """Return rank 0's fp32 tensor of this shape on every rank; the others pass None."""
        tensor = torch.empty(shape) if value is None else value.contiguous()
        dist.broadcast(tensor, src=0, group=self._group)
        return tensor

    def failure(self, message: str, kind: type[UserError] = UserError) -> UserError:
        """Return the error with which all ranks end together; rank 0's has the message.

        The others print nothing and have the same exit status.

        No collective: for what every rank knows to have failed.
        """
        return kind(message) if self.is_first else SilentRankError(kind.exit_status)

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """End all ranks here if anything is raised inside on some of them.

        Raises:
            Exception: what this rank raised itself.
            SilentRankError: another rank raised something, and has the message.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.any(error is not None):
            raise error or SilentRankError()
