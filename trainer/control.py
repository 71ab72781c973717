"""Decisions that all ranks take together."""

import torch
import torch.distributed as dist


class Control:
    """A gloo group beside the engine's own, so that agreeing on a flag never waits for a GPU."""

    def __init__(self):
        self._group = dist.new_group(backend="gloo")

    def any(self, flag: bool) -> bool:
        """Whether any rank raises the flag. Every rank must ask, at the same place."""
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return bool(raised)
