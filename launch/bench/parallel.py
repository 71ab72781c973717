"""``longspan bench parallel``: operations over context-parallel ranks on the CPU, against one rank.

Every rank has one thread, on a core of its own if there are enough. The single rank and all of them
take turns in the same processes, so that whatever else the machine does affects both alike.
"""

import json
import os
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from ...trainer.errors import UserError
from ...trainer.paths import escape_path
from ...trainer.progress import track
from ..options import counts, out_folder
from ..process import process_group, under_torchrun
from ..ranks import run_ranks
from ..table import table
from .parallel_timing import ParallelSettings, ParallelTiming


def bench_parallel(options: Namespace) -> int:
    """Print a table, and write ``parallel.json`` and ``parallel.png`` to ``options.out``.

    Returns:
        The exit status. Under torchrun this process is a rank that measures, else it starts the
        ranks: the same command.
    """
    settings = ParallelSettings(
        **counts(options, *(field.name for field in fields(ParallelSettings)))
    )
    if settings.heads % settings.kv_heads:
        raise UserError(f"--kv-heads: {settings.kv_heads} does not divide --heads {settings.heads}")
    if settings.ranks < 2:
        raise UserError(f"--ranks: must be at least 2, got {settings.ranks}")
    if settings.length % (128 * settings.ranks):
        raise UserError(
            f"--length: {settings.length} is not a multiple of 128 x {settings.ranks} ranks, "
            "whole blocks for each"
        )

    if under_torchrun():
        _measure_as_rank(settings, Path(options.out))
        return 0
    out_folder(options)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    command = [sys.executable, "-u", "-m", "longspan", "bench", "parallel", *sizes]
    return run_ranks([*command, "--out", escape_path(options.out)], settings.ranks, threads=1)


def _measure_as_rank(settings: ParallelSettings, out: Path) -> None:
    """Measure all operations together with the other ranks; the first one reports."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    with process_group(1):
        import torch.distributed as dist

        from .parallel_operations import measure, operations

        is_first = dist.get_rank() == 0
        all_operations = list(operations(settings))
        timings = []
        with _progress(len(all_operations), shown=is_first) as advance:
            for operation in all_operations:
                timings.append(measure(settings, operation))
                advance(1)
        if is_first:
            _report(settings, timings, len(cores), out)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda amount: None
        return
    with track("operations", total, of_bytes=False) as advance:
        yield advance


def _report(
    settings: ParallelSettings, timings: list[ParallelTiming], num_cores: int, out: Path
) -> None:
    from .measure import machine

    machine_record = {**machine(), "cores": num_cores}
    print(
        f"{machine_record['device']}, {num_cores} cores; {settings.length:,} tokens (zigzag), "
        f"{settings.heads} query and {settings.kv_heads} KV heads of {settings.head_dim}, fp32"
    )
    print(
        f"{settings.ranks} gloo processes of one thread; forward and backward, "
        f"medians of {settings.repeats}"
    )
    print("in messages: of the slowest rank's time, with its waiting for the others")
    print(_table(settings, timings))

    report = {
        "machine": machine_record,
        "settings": asdict(settings),
        "rows": [asdict(timing) for timing in timings],
    }
    (out / "parallel.json").write_text(json.dumps(report, indent=1) + "\n")
    _draw(settings, timings, out / "parallel.png")


def _table(settings: ParallelSettings, timings: list[ParallelTiming]) -> str:
    header = (
        "operation",
        "schedule",
        "1 rank ms",
        f"{settings.ranks} ranks ms",
        "efficiency",
        "in messages",
        "error",
    )
    rows = [header]
    for timing in timings:
        alone_ms = 1e3 * statistics.median(timing.alone)
        together_ms = 1e3 * statistics.median(timing.together)
        messages_ms = 1e3 * statistics.median(timing.messages)
        rows.append(
            (
                timing.operation,
                timing.schedule,
                f"{alone_ms:,.1f}",
                f"{together_ms:,.1f}",
                f"{timing.speedup / settings.ranks:.0%}",
                f"{messages_ms / together_ms:.0%}",
                f"{timing.error:.0e}",
            )
        )
    return table(rows)


def _draw(settings: ParallelSettings, timings: list[ParallelTiming], path: Path) -> None:
    """Draw a bar for each timing: the share of the ranks' time that was of use."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.35 * len(timings) + 1.2), layout="constrained")
    names = [f"{timing.operation}, {timing.schedule}" for timing in timings]
    axes.barh(names, [100 * timing.speedup / settings.ranks for timing in timings])
    axes.invert_yaxis()
    axes.axvline(100, color="0.6", linewidth=1)
    axes.set_xlabel(f"% of {settings.ranks} times one rank's speed")
    figure.savefig(path, dpi=130)
    plt.close(figure)
