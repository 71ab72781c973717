"""What ``longspan bench attention`` and ``longspan bench linear`` share: candidates of a length, measured in turns.

All candidates of a length are measured in turns in one process, so that what else the machine does falls on all of them alike.
Each is checked before it is timed. Peak memory on a CPU is that of a fresh process.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...trainer.errors import UserError
from ...trainer.versions import version_of

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative error that is allowed; on CUDA products of fp32 may be those of TF32."""
STEPS = ("forward", "forward+backward")
DENSE = "dense (sdpa)"
"""The candidate that others are compared with."""


class Work(Protocol):
    """Goes forward, calls ``between()`` and goes backward; gives the output and the gradients of all inputs."""

    def __call__(self, between: Callable[[], None] | None = None) -> tuple[Tensor, ...]: ...


@dataclass(kw_only=True)
class Measured:
    """What was found of one candidate at one length. Its own fields are those of a subclass, ``candidate`` and ``length``
    among them.
    """

    status: str = "measured"
    """Or why it was not: ``wrong: ...``, ``cannot run: ...`` or ``skipped: ...``, with no numbers beside it."""
    seconds: dict[str, list[float]] | None = None
    """Of every repeat: ``forward``, and ``forward+backward``."""
    peak_bytes: int | None = None
    """By how much memory grew in one forward and backward, beside the inputs and the upstream gradient; None on a CPU whose
    system does not tell."""
    peak_multiple: float | None = None
    """The same in units of the bytes of the inputs, the output and the gradients of these."""
    ratio: dict[str, float] | None = None
    """Median time of dense SDPA divided by this one's."""

    @property
    def median(self) -> dict[str, float] | None:
        return self.seconds and {
            step: statistics.median(times) for step, times in self.seconds.items()
        }

    def record(self) -> dict:
        """As JSON has it: first what it is, then what was found."""
        values = asdict(self)
        found = {field.name: values.pop(field.name) for field in fields(Measured)}
        return {**values, **found, "median": self.median}


def in_turns(
    rows: list[Measured],
    repeats: int,
    *,
    make: Callable[[Measured], Work],
    fault: Callable[[Measured], str | None],
    peak: Callable[[Measured], int | None],
    tensor_bytes: Callable[[Measured], int],
    advance: Callable[[int], None],
) -> None:
    """Fill in the rows of one length, but those that are skipped.

    Args:
        make: the row's work, asked for at every turn.
        fault: what is wrong with its results; a row with a fault is not timed.
        peak: bytes by which memory grows.
        tensor_bytes: the unit of ``peak_multiple``.
        advance: gets 1, ``repeats + 2`` times for each row.
    """
    for row in rows:
        try:
            if row.status == "measured":
                row.status = fault(row) or row.status
            if row.status == "measured":
                make(row)()  # compiles, and takes memory from the system
                row.seconds = {step: [] for step in STEPS}
        except Exception as error:
            row.status = f"cannot run: {one_line(error)}"
        advance(1)
    for _ in range(repeats):
        for row in rows:
            if row.seconds:
                for step, seconds in zip(STEPS, timed(make(row)), strict=True):
                    row.seconds[step].append(seconds)
            advance(1)
    for row in rows:
        if row.seconds:
            row.peak_bytes = peak(row)
            row.peak_multiple = row.peak_bytes and row.peak_bytes / tensor_bytes(row)
        advance(1)


def step_of(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Work:
    """The work of ``function(*inputs)``."""
    for x in inputs:
        x.requires_grad_()

    def work(between: Callable[[], None] | None = None) -> tuple[Tensor, ...]:
        out = function(*inputs)
        if between:
            between()
        return (out.detach(), *torch.autograd.grad(out, inputs, upstream))

    return work


def compare(rows: Iterable[Measured]) -> None:
    """Ratios with dense SDPA at the same length, where both were measured."""
    dense = {row.length: row.median for row in rows if row.candidate == DENSE and row.seconds}
    for row in rows:
        if row.seconds and row.length in dense:
            row.ratio = {step: dense[row.length][step] / row.median[step] for step in STEPS}


def wrong(results: Iterable[tuple[str, Tensor, Tensor]], dtype: str) -> str | None:
    """The first fault of ``(name, result, what it should be)``, each ``[batch, time, heads, dim]``."""
    for name, result, want in results:
        error, allowed = _relative_error(result, want), TOLERANCE[dtype]
        if not error <= allowed:  # nor NaN
            length = result.shape[1]
            return f"wrong: {name} at {length:,} tokens has a relative error of {error:.2g}, {allowed:g} is allowed"
    return None


def _relative_error(result: Tensor, want: Tensor) -> float:
    """The worst of any head in any sixteenth of the time: gradients of late keys are small beside those of the first."""
    parts = zip(result.double().chunk(16, 1), want.double().chunk(16, 1), strict=True)
    errors = [
        (got - right).norm(dim=(1, 3)) / right.norm(dim=(1, 3)).clamp_min(1e-6)
        for got, right in parts
    ]
    return torch.stack(errors).max().item()


def one_line(error: Exception) -> str:
    """The error's kind and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:160]}" if said else type(error).__name__


def timed(work: Work) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward."""
    if device() == "cpu":
        between = []
        start = time.perf_counter()
        work(lambda: between.append(time.perf_counter()))
        return between[0] - start, time.perf_counter() - start
    # Empty the GPU's cache: it also keeps the GPU busy while the first kernels are being launched.
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    start, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    work(between.record)
    end.record()
    end.synchronize()
    return start.elapsed_time(between) / 1e3, start.elapsed_time(end) / 1e3


def cuda_peak(work: Work) -> int:
    """By how many bytes the memory in use grows while it runs."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fresh_peak(module: str, given: dict, first: int = 128) -> int | None:
    """By how many bytes a fresh process, or on CUDA its memory there, grows while it runs a candidate once; None where that
    cannot be told.

    Args:
        module: its ``work_of(given, most=None)`` makes the work, of at most so many tokens.
        given: what JSON can hold.
        first: tokens of a work that it does before, so that torch loads what it loads at first use.
    """
    code = "import sys; from longspan.launch.bench.measure import print_growth; print_growth(*sys.argv[1:])"
    # What is freed before must go back to the system, or it would be used again unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, module, json.dumps(given), str(first)]
    done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    return None if done.returncode else int(done.stdout)


def print_growth(module: str, argument: str, first: str) -> None:
    """The process of :func:`fresh_peak`."""
    work_of, given = import_module(module).work_of, json.loads(argument)
    work_of(given, most=int(first))()
    work = work_of(given)
    if device() == "cuda":
        print(cuda_peak(work))
        return
    with suppress(OSError):  # where it is not permitted the peak so far is hardly more
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = _peak_resident()
    work()
    print(_peak_resident() - before)


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    )


def device() -> str:
    """That everything is measured on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict:
    """Its name and how many threads torch uses."""
    if device() == "cuda":
        return {"device": torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
    }


def write_report(path: Path, settings, rows: Sequence[Measured], packages: Sequence[str]) -> None:
    """``settings``, a dataclass, and ``rows`` as JSON, beside the machine and the versions of Python and ``packages``."""
    versions = {name: version_of(name) for name in ("python", *packages)}
    records = [row.record() for row in rows]
    report = {
        "machine": machine(),
        "versions": versions,
        "settings": asdict(settings),
        "rows": records,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def default_dtype() -> str:
    """What fits the device."""
    return "bfloat16" if device() == "cuda" else "float32"


def dtype_of(options: Namespace) -> str:
    """``--dtype``, or what fits the device."""
    return default_dtype() if options.dtype == "auto" else options.dtype


def out_folder(options: Namespace) -> Path:
    """``--out``, made where it is not there."""
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made: {error}") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out: {out} cannot be written to")
    return out


def plot_against_length(
    axes, lines: dict[str, dict[int, float]], lengths: list[int], **labels: str
) -> None:
    """On matplotlib's ``axes``, both logarithmic: of each name its values at some of the lengths.

    Args:
        labels: ``ylabel`` and ``title``.
    """
    from matplotlib.ticker import LogFormatter

    for name, values in lines.items():
        axes.plot(values.keys(), values.values(), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", **labels)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3)
