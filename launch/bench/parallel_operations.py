"""The operations of ``longspan bench parallel``, and how one is timed by all ranks together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ... import attention, parallel
from ...attention import S2, Causal, Pattern, Window
from ...parallel import Layout
from ...parallel.schedules.names import KV_SCHEDULES, Schedule, schedules_named
from .parallel_timing import ParallelSettings, ParallelTiming

BLOCK = 64
"""Tokens on whose multiples the layout cuts a sequence."""

Run = Callable[[list[Tensor], Layout | None], Tensor]
"""``run(inputs, layout)``: this rank's part of the output, from its part of the inputs.

Without a layout the inputs and the output are whole.
"""


class Operation(NamedTuple):
    """An operation under a schedule, and its whole inputs, ``[1, time, heads, ...]``."""

    name: str
    schedule: str
    run: Run
    inputs: list[Tensor]


def operations(settings: ParallelSettings) -> Iterator[Operation]:
    """Yield all operations, with the same inputs on every rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, settings.length, *shape, generator=generator)

    q, k, v = (
        draw(heads, settings.head_dim)
        for heads in (settings.heads, settings.kv_heads, settings.kv_heads)
    )
    yield from _softmax_operations(settings, [q, k, v])

    q, k, v = (draw(settings.heads, settings.head_dim) for _ in "qkv")
    k = F.normalize(k, dim=-1)
    decay = -0.1 * draw(settings.heads).sigmoid()
    beta = draw(settings.heads).sigmoid()
    for schedule in ("gather", "scan"):
        yield Operation("lightning", schedule, _lightning(schedule), [q, k, v, decay])
    for schedule in ("gather", "scan"):
        inputs = [q, k, v, decay, beta]
        yield Operation("gated_deltanet", schedule, _gated_deltanet(schedule), inputs)


def _softmax_operations(settings: ParallelSettings, qkv: list[Tensor]) -> Iterator[Operation]:
    patterns: dict[str, Pattern] = {
        "full": Causal(),
        "S2(64, 16, 16)": S2(64, 16, 16).spread(settings.kv_heads),
        "Window(1024)": Window(1024),
    }
    heads = (settings.heads, settings.kv_heads)
    for name, pattern in patterns.items():
        for schedule in (*KV_SCHEDULES, "heads"):
            (kv_schedule,) = schedules_named(schedule, settings.ranks)
            if not kv_schedule.unsupported_reason(settings.ranks, pattern, *heads):
                yield Operation(name, schedule, _attention(pattern, kv_schedule), qkv)

    # What distributed multi-head attention (arXiv 2302.06218), heads over all ranks, measured
    # itself against.
    (kv_schedule,) = schedules_named("heads", settings.ranks)
    if not kv_schedule.unsupported_reason(settings.ranks, None, *heads):
        # Half of the sequence: the weights alone are 4 bytes x length^2 a head.
        length = settings.length // 2
        half = [x[:, :length].clone() for x in qkv]
        yield Operation(f"full ({length:,} tokens) / unfused", "heads", _against_unfused, half)


def _attention(pattern: Pattern, kv_schedule: Schedule) -> Run:
    def run(inputs: list[Tensor], layout: Layout | None) -> Tensor:
        q, k, v = inputs
        if layout is None:
            return _tensor(attention.attend(q, k, v, pattern))
        return _tensor(
            parallel.attend(q, k, v, pattern, layout, _all_ranks(), schedule=kv_schedule)
        )

    return run


def _against_unfused(inputs: list[Tensor], layout: Layout | None) -> Tensor:
    q, k, v = inputs
    if layout is None:
        return _unfused_attention(q, k, v)
    return _tensor(parallel.attend(q, k, v, Causal(), layout, _all_ranks(), schedule="heads"))


def _unfused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal multi-head attention, head by head by its formula.

    All weights are materialized, and kept for the backward pass.
    """
    length = q.shape[1]
    group_size = q.shape[2] // k.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    outs = []
    for head in range(q.shape[2]):
        kv_head = head // group_size
        scores = q[:, :, head] @ k[:, :, kv_head].mT * q.shape[3] ** -0.5  # [1, time, time]
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        outs.append(weights @ v[:, :, kv_head])
    return torch.stack(outs, 2)


def _lightning(schedule: str) -> Run:
    def run(inputs: list[Tensor], layout: Layout | None) -> Tensor:
        q, k, v, decay = inputs
        if layout is None:
            return _tensor(attention.linear_attention(q, k, v, decay=decay))
        return _tensor(
            parallel.linear_attention(q, k, v, layout, _all_ranks(), decay=decay, schedule=schedule)
        )

    return run


def _gated_deltanet(schedule: str) -> Run:
    def run(inputs: list[Tensor], layout: Layout | None) -> Tensor:
        q, k, v, decay, beta = inputs
        if layout is None:
            return _tensor(attention.linear_attention(q, k, v, decay=decay, beta=beta))
        return _tensor(
            parallel.linear_attention(
                q, k, v, layout, _all_ranks(), decay=decay, beta=beta, schedule=schedule
            )
        )

    return run


def _tensor(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return the output of a call that was not asked for anything else."""
    assert isinstance(out, Tensor)
    return out


def _all_ranks() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


class TimedStep(NamedTuple):
    """A forward and backward pass."""

    seconds: float
    results: list[Tensor]
    """The output and the gradients of the inputs."""


def measure(settings: ParallelSettings, operation: Operation) -> ParallelTiming:
    """Time an operation in turns on the first rank alone and on all ranks; every rank calls it."""
    rank = dist.get_rank()
    layout = Layout.zigzag(operation.inputs[0].shape[1], settings.ranks, BLOCK)
    local_inputs = [layout.shard(x, rank).requires_grad_() for x in operation.inputs]
    whole_inputs = [x.clone().requires_grad_() for x in operation.inputs]

    # Every rank draws the gradient of its part of the output; the first rank's whole one is put
    # together from them.
    out_shape = operation.run(local_inputs, layout).shape
    local_grad_out = torch.randn(out_shape, generator=torch.Generator().manual_seed(rank))
    whole_grad_out = layout.unshard(_gather(local_grad_out))

    def step_together() -> TimedStep:
        return _step(operation.run, local_inputs, layout, local_grad_out)

    def step_alone() -> TimedStep:
        return _step(operation.run, whole_inputs, None, whole_grad_out)

    results = step_together().results
    # On one rank only: unfused attention needs gigabytes.
    expected = step_alone().results if rank == 0 else None
    error = _error(results, _broadcast_shards(expected, results, layout))

    timing = ParallelTiming(operation.name, operation.schedule, [], [], [], error)
    for _ in range(settings.repeats):
        dist.barrier()
        if rank == 0:
            timing.alone.append(step_alone().seconds)
        dist.barrier()
        with _time_collectives() as clock:
            seconds = step_together().seconds
        of_ranks = _gather((seconds, clock.seconds, error))
        slowest_seconds, message_seconds, _ = max(of_ranks)
        timing.together.append(slowest_seconds)
        timing.messages.append(message_seconds)
        errors = [timing.error, *(rank_error for _, _, rank_error in of_ranks)]
        timing.error = float(torch.tensor(errors).max())  # NaN, if one is
    return timing


def _step(run: Run, inputs: list[Tensor], layout: Layout | None, grad_out: Tensor) -> TimedStep:
    start = time.perf_counter()
    out = run(inputs, layout)
    gradients = torch.autograd.grad(out, inputs, grad_out)
    return TimedStep(time.perf_counter() - start, [out.detach(), *gradients])


def _gather(value: Any) -> list[Any]:
    """Return every rank's value, in rank order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _broadcast_shards(
    whole: list[Tensor] | None, like: list[Tensor], layout: Layout
) -> list[Tensor]:
    """Return this rank's parts of the first rank's tensors.

    Args:
        whole: the tensors on the first rank, None on others.
        like: this rank's tensors of the same shapes but for the time.
        layout: of the sequence.
    """
    if whole is None:
        tensors = [torch.empty((1, layout.length, *x.shape[2:])) for x in like]
    else:
        tensors = [x.contiguous() for x in whole]
    for x in tensors:
        dist.broadcast(x, 0)
    return [layout.shard(x, dist.get_rank()) for x in tensors]


def _error(results: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative error of the tensors; NaN, if one has any."""
    errors = [
        (ours - right).norm() / right.norm() for ours, right in zip(results, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


class _Clock:
    """Adds up what this rank spends in collectives, and in waiting for them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with its time added to the clock's."""

        def call(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds += time.perf_counter() - start
            return result

        return call


class _TimedWork:
    """The handle of an asynchronous collective, whose waiting is timed."""

    def __init__(self, work: dist.Work, clock: _Clock):
        self.wait = clock.timed(work.wait)


@contextmanager
def _time_collectives() -> Iterator[_Clock]:
    """Replace torch's collectives by timed ones for a while."""
    clock = _Clock()

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        start = clock.timed(collective)

        def call(*arguments, **options):
            work = start(*arguments, **options)  # None for a synchronous collective
            return work and _TimedWork(work, clock)

        return call

    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    for name, collective in originals.items():
        setattr(dist, name, timed(collective))
    try:
        yield clock
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)


_COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor")
