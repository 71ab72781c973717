"""``longspan bench parallel``: the operations over context-parallel ranks on this machine's CPU against one of them.

Every rank has one thread, on a core of its own where there are enough. The one rank and all of them take turns in the same
processes, so that what else the machine does falls on both alike.
"""

import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts
from ..process import process_group, under_torchrun
from ..ranks import run_ranks
from ..table import table


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on, beside the machine."""

    ranks: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int


@dataclass
class Row:
    """One operation under one schedule; seconds of forward and backward, of every repeat."""

    operation: str
    schedule: str
    alone: list[float]
    """One rank with all of the sequence."""
    together: list[float]
    """The slowest of all ranks."""
    messages: list[float]
    """What that rank spent in collectives, waiting for others among it."""
    error: float
    """Of the output and gradients, relative to those of the one rank."""

    @property
    def speedup(self) -> float:
        """How many times as fast as one rank."""
        return statistics.median(self.alone) / statistics.median(self.together)


def bench_parallel(options: Namespace) -> int:
    """Print a table, and write ``parallel.json`` and ``parallel.png`` to the folder ``options.out``."""
    from . import measure

    settings = Settings(**counts(options, *(field.name for field in fields(Settings))))
    if settings.heads % settings.kv_heads:
        raise UserError(f"--kv-heads: {settings.kv_heads} does not divide --heads {settings.heads}")
    if settings.ranks < 2:
        raise UserError(f"--ranks: must be at least 2, got {settings.ranks}")
    if settings.length % (128 * settings.ranks):
        raise UserError(
            f"--length: {settings.length} is not a multiple of 128 x {settings.ranks} ranks, whole blocks for each"
        )
    if under_torchrun():
        _rank(settings, Path(options.out))
        return 0
    measure.out_folder(options)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    command = [
        sys.executable,
        "-u",
        "-m",
        "longspan",
        "bench",
        "parallel",
        *given,
        "--out",
        options.out,
    ]
    return run_ranks(command, settings.ranks, 1)


def _rank(settings: Settings, out: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    with process_group(1):
        import torch.distributed as dist

        cases, rows = list(_cases(settings)), []
        with (
            track("operations", len(cases), of_bytes=False)
            if dist.get_rank() == 0
            else nullcontext() as advance
        ):
            for case in cases:
                rows.append(_measured(settings, *case))
                if advance:
                    advance(1)
        if dist.get_rank() == 0:
            _report(settings, rows, len(cores), out)


def _cases(settings: Settings) -> Iterator[tuple[str, str, Callable, list]]:
    """(operation, schedule, ``run(inputs, layout or None)``, all inputs) of each."""
    import torch
    import torch.distributed as dist

    from ... import attention, parallel
    from ...attention import S2, Causal, Window
    from ...parallel.schedules.names import named, unsupported_reason

    group, length, dim = dist.group.WORLD, settings.length, settings.head_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int):
        return torch.randn(1, length, *shape, generator=generator)

    softmax = [
        draw(settings.heads, dim),
        draw(settings.kv_heads, dim),
        draw(settings.kv_heads, dim),
    ]
    patterns = {
        "full": Causal(),
        "S2(64, 16, 16)": S2(64, 16, 16).spread(settings.kv_heads),
        "Window(1024)": Window(1024),
    }
    for name, pattern in patterns.items():
        for schedule in ("ring", "gather", "stripes", "heads"):
            (one,) = named(schedule, settings.ranks)
            if unsupported_reason(one, settings.ranks, pattern, settings.heads, settings.kv_heads):
                continue

            def attend(inputs, layout, pattern=pattern, one=one):
                if layout is None:
                    return attention.attend(*inputs, pattern)
                return parallel.attend(*inputs, pattern, layout, group, schedule=one)

            yield name, schedule, attend, softmax

    def distributed(inputs, layout):
        if layout is None:
            return _unfused(*inputs)
        return parallel.attend(*inputs, Causal(), layout, group, schedule="heads")

    # What distributed multi-head attention (arXiv 2302.06218), heads over all ranks, measured itself against.
    if not unsupported_reason(
        named("heads", settings.ranks)[0], settings.ranks, None, settings.heads, settings.kv_heads
    ):
        # The weights alone take 4 bytes x length^2 a head.
        half = [x[:, : length // 2].clone() for x in softmax]
        yield f"full ({length // 2:,} tokens) / unfused", "heads", distributed, half
    q, k, v = (draw(settings.heads, dim) for _ in "qkv")
    k = torch.nn.functional.normalize(k, dim=-1)
    decay, beta = -0.1 * draw(settings.heads).sigmoid(), draw(settings.heads).sigmoid()
    linear = {
        "lightning": ([q, k, v, decay], ("decay",)),
        "gated_deltanet": ([q, k, v, decay, beta], ("decay", "beta")),
    }
    for name, (inputs, options) in linear.items():
        for schedule in ("gather", "scan"):

            def attend(inputs, layout, options=options, schedule=schedule):
                more = dict(zip(options, inputs[3:], strict=True))
                if layout is None:
                    return attention.linear_attention(*inputs[:3], **more)
                return parallel.linear_attention(
                    *inputs[:3], layout, group, schedule=schedule, **more
                )

            yield name, schedule, attend, inputs


def _unfused(q, k, v):
    """Causal multi-head attention as a formula, head by head: all weights are made, and kept for the backward pass."""
    import torch

    length, group = q.shape[1], q.shape[2] // k.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].mT * q.shape[3] ** -0.5
        out.append(scores.masked_fill_(future, -torch.inf).softmax(-1) @ v[:, :, head // group])
    return torch.stack(out, 2)


def _measured(settings: Settings, operation: str, schedule: str, run: Callable, whole: list) -> Row:
    import torch
    import torch.distributed as dist

    from ...parallel import Layout

    rank, layout = dist.get_rank(), Layout.zigzag(whole[0].shape[1], settings.ranks, 64)
    own = [layout.shard(x, rank).requires_grad_() for x in whole]
    whole = [x.clone().requires_grad_() for x in whole]
    upstream = torch.randn(run(own, layout).shape, generator=torch.Generator().manual_seed(rank))
    parts: list = [None] * settings.ranks
    dist.all_gather_object(parts, upstream)
    upstreams = {None: layout.unshard(parts), layout: upstream}

    def step(inputs, layout) -> tuple[float, list]:
        start = time.perf_counter()
        out = run(inputs, layout)
        gradients = torch.autograd.grad(out, inputs, upstreams[layout])
        return time.perf_counter() - start, [out.detach(), *gradients]

    found = step(own, layout)[1]
    # On one rank alone: unfused attention takes gigabytes.
    shapes = [(1, layout.length, *x.shape[2:]) for x in found]
    expected = (
        [x.contiguous() for x in step(whole, None)[1]]
        if rank == 0
        else [torch.empty(shape) for shape in shapes]
    )
    for x in expected:
        dist.broadcast(x, 0)
    expected = [layout.shard(x, rank) for x in expected]
    error = float(
        torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]).max()
    )  # NaN, if there is any
    row = Row(operation, schedule, [], [], [], error)
    for _ in range(settings.repeats):
        dist.barrier()
        if rank == 0:
            row.alone.append(step(whole, None)[0])
        dist.barrier()
        with _collectives() as spent:
            seconds = step(own, layout)[0]
        times: list = [None] * settings.ranks
        dist.all_gather_object(times, (seconds, spent[0], error))
        slowest = max(times)
        row.together.append(slowest[0])
        row.messages.append(slowest[1])
        row.error = float(torch.tensor([row.error, *(each[2] for each in times)]).max())
    return row


@contextmanager
def _collectives() -> Iterator[list[float]]:
    """Adds up what this rank spends in collectives, and in waiting for them."""
    import torch.distributed as dist

    spent, names = [0.0], ("all_to_all_single", "all_gather_into_tensor")
    real = {name: getattr(dist, name) for name in names}

    def clocked(function: Callable) -> Callable:
        def call(*args, **options):
            start = time.perf_counter()
            work = function(*args, **options)
            spent[0] += time.perf_counter() - start
            return work and _Waited(work, spent)

        return call

    for name in names:
        setattr(dist, name, clocked(real[name]))
    try:
        yield spent
    finally:
        for name in names:
            setattr(dist, name, real[name])


class _Waited:
    def __init__(self, work, spent: list[float]):
        self.work, self.spent = work, spent

    def wait(self) -> None:
        start = time.perf_counter()
        self.work.wait()
        self.spent[0] += time.perf_counter() - start


def _report(settings: Settings, rows: list[Row], cores: int, out: Path) -> None:
    import json

    from . import measure

    machine = {**measure.machine(), "cores": cores}
    lines = [
        (
            "operation",
            "schedule",
            "1 rank ms",
            f"{settings.ranks} ranks ms",
            "efficiency",
            "in messages",
            "error",
        )
    ]
    for row in rows:
        alone, together, messages = (
            1e3 * statistics.median(x) for x in (row.alone, row.together, row.messages)
        )
        share = messages / together
        ideal = f"{row.speedup / settings.ranks:.0%}"
        lines.append(
            (
                row.operation,
                row.schedule,
                f"{alone:,.1f}",
                f"{together:,.1f}",
                ideal,
                f"{share:.0%}",
                f"{row.error:.0e}",
            )
        )
    heads = f"{settings.heads} query and {settings.kv_heads} KV heads of {settings.head_dim}"
    print(f"{machine['device']}, {cores} cores; {settings.length:,} tokens (zigzag), {heads}, fp32")
    print(
        f"{settings.ranks} gloo processes of one thread; forward and backward, medians of {settings.repeats}"
    )
    print("in messages: of the slowest rank's time, with its waiting for the others")
    print(table(lines))
    record = {
        "machine": machine,
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
    }
    (out / "parallel.json").write_text(json.dumps(record, indent=1) + "\n")
    _draw(settings, rows, out / "parallel.png")


def _draw(settings: Settings, rows: list[Row], path: Path) -> None:
    """A bar for each row: how much of the ranks' time was of use."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.35 * len(rows) + 1.2), layout="constrained")
    names = [f"{row.operation}, {row.schedule}" for row in rows]
    axes.barh(names, [100 * row.speedup / settings.ranks for row in rows])
    axes.invert_yaxis()
    axes.axvline(100, color="0.6", linewidth=1)
    axes.set_xlabel(f"% of {settings.ranks} times one rank's speed")
    figure.savefig(path, dpi=130)
    plt.close(figure)
