"""What ``bench attention`` and ``bench linear`` share: candidates of a length, measured in turns.

All candidates of a length are measured in turns in one process, so that whatever else the machine
does affects all of them alike. Each is checked before it is timed. Peak memory on a CPU is that of
a fresh process.
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ...trainer.versions import version_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative error that is allowed; on CUDA fp32 products may be computed in TF32."""
PASSES = ("forward", "forward+backward")
"""What is timed."""
DENSE = "dense (sdpa)"
"""The candidate that others are compared with."""


class ForwardBackward(Protocol):
    """Runs forward, calls ``between()``, runs backward; returns the output and all gradients."""

    def __call__(self, between: Callable[[], Any] | None = None) -> tuple[Tensor, ...]: ...


class Candidate:
    """What is measured.

    It is no dataclass, so that these fields stand in reports where a subclass declares them.
    """

    candidate: str
    """Its name in the table."""
    length: int
    """Tokens."""


@dataclass(kw_only=True)
class Timing(Candidate):
    """What was measured of one candidate at one length; subclasses add what the candidate is."""

    status: str = "measured"
    """Or why there are no numbers: ``wrong: ...``, ``cannot run: ...`` or ``skipped: ...``."""
    seconds: dict[str, list[float]] | None = None
    """Times of every repeat, by pass."""
    peak_bytes: int | None = None
    """Growth of memory in both passes, besides the inputs and the output's gradient.

    None on a CPU whose system does not say.
    """
    peak_multiple: float | None = None
    """The same in units of the bytes of the inputs, the output and their gradients."""
    ratio: dict[str, float] | None = None
    """Median time of dense attention divided by this one's, by pass."""

    @property
    def median(self) -> dict[str, float] | None:
        """Median seconds, by pass."""
        if self.seconds is None:
            return None
        return {name: statistics.median(times) for name, times in self.seconds.items()}

    def record(self) -> dict:
        """Return it as JSON has it: first what the candidate is, then what was measured."""
        candidate = asdict(self)
        measured = {field.name: candidate.pop(field.name) for field in fields(Timing)}
        return {**candidate, **measured, "median": self.median}


AnyTiming = TypeVar("AnyTiming", bound=Timing)


def measure_in_turns(
    timings: Sequence[AnyTiming],
    repeats: int,
    *,
    build: Callable[[AnyTiming], ForwardBackward],
    find_fault: Callable[[AnyTiming], str | None],
    peak: Callable[[AnyTiming], int | None],
    tensor_bytes: Callable[[AnyTiming], int],
    advance: Callable[[int], None],
) -> None:
    """Fill in the timings of one length, except those that are skipped.

    Args:
        timings: the candidates.
        repeats: turns of each candidate.
        build: makes what is timed; called at every turn.
        find_fault: says what is wrong with a candidate's results, if anything; such a candidate is
            not timed.
        peak: bytes by which memory grows.
        tensor_bytes: the unit of ``peak_multiple``.
        advance: called with 1, ``repeats + 2`` times for each candidate.
    """
    for timing in timings:
        try:
            if timing.status == "measured":
                timing.status = find_fault(timing) or timing.status
            if timing.status == "measured":
                build(timing)()  # compiles, and gets memory from the system
                timing.seconds = {name: [] for name in PASSES}
        except Exception as error:
            timing.status = f"cannot run: {_one_line(error)}"
        advance(1)

    for _ in range(repeats):
        for timing in timings:
            if timing.seconds:
                for name, seconds in zip(PASSES, time_once(build(timing)), strict=True):
                    timing.seconds[name].append(seconds)
            advance(1)

    for timing in timings:
        if timing.seconds:
            timing.peak_bytes = peak(timing)
            if timing.peak_bytes is not None:
                timing.peak_multiple = timing.peak_bytes / tensor_bytes(timing)
        advance(1)


def forward_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor
) -> ForwardBackward:
    """Return the passes of ``function(*inputs)``, whose output has the gradient ``grad_out``."""
    for x in inputs:
        x.requires_grad_()

    def call(between: Callable[[], Any] | None = None) -> tuple[Tensor, ...]:
        out = function(*inputs)
        if between:
            between()
        return (out.detach(), *torch.autograd.grad(out, inputs, grad_out))

    return call


def compare_with_dense(timings: Iterable[Timing]) -> None:
    """Fill in the ratios with dense attention of the same length, if both were measured."""
    timings = list(timings)
    dense = {timing.length: timing.median for timing in timings if timing.candidate == DENSE}
    for timing in timings:
        own_median = timing.median
        dense_median = dense.get(timing.length)
        if own_median and dense_median:
            timing.ratio = {name: dense_median[name] / own_median[name] for name in PASSES}


class Comparison(NamedTuple):
    """A result beside what it should be, both ``[batch, time, heads, dim]``."""

    name: str
    result: Tensor
    expected: Tensor


def first_fault(comparisons: Iterable[Comparison], dtype: str) -> str | None:
    """Return which result is first to have a larger error than the dtype allows, None if none."""
    allowed = TOLERANCE[dtype]
    for name, result, expected in comparisons:
        error = _relative_error(result, expected)
        if not error <= allowed:  # also if it is NaN
            return (
                f"wrong: {name} at {result.shape[1]:,} tokens has a relative error of {error:.2g}, "
                f"{allowed:g} is allowed"
            )
    return None


def _relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the largest error of any head in any sixteenth of the time.

    Gradients of late keys are small beside those of the first: over all of the time their errors
    would not be seen.
    """
    chunks = zip(result.double().chunk(16, 1), expected.double().chunk(16, 1), strict=True)
    errors = [
        (ours - right).norm(dim=(1, 3)) / right.norm(dim=(1, 3)).clamp_min(1e-6)
        for ours, right in chunks
    ]
    return torch.stack(errors).max().item()


def _one_line(error: Exception) -> str:
    """Return the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def time_once(call: ForwardBackward) -> tuple[float, float]:
    """Return the seconds of the forward pass, and of both passes."""
    if device() == "cpu":
        forward_ends: list[float] = []
        start = time.perf_counter()
        call(lambda: forward_ends.append(time.perf_counter()))
        return forward_ends[0] - start, time.perf_counter() - start

    # Empty the GPU's cache: it also keeps the GPU busy while the first kernels are being launched.
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    start_event, forward_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start_event.record()
    call(forward_event.record)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(forward_event) / 1e3, start_event.elapsed_time(end_event) / 1e3


def cuda_peak(call: ForwardBackward) -> int:
    """Return by how many bytes the memory in use on the GPU grows while it runs."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fresh_process_peak(benchmark: str, candidate: dict, warmup_tokens: int = 128) -> int | None:
    """Return the growth in bytes of a fresh process, or of its GPU memory, that runs a candidate.

    Args:
        benchmark: a key of :data:`longspan.launch.workers.peak_memory.BUILDERS`.
        candidate: what the benchmark builds the call from, as JSON can hold it.
        warmup_tokens: of a shorter call before, so that torch loads what it loads at first use.

    Returns:
        The bytes, or None if the process failed, as on a system that does not tell.
    """
    # Memory that is freed before must go back to the system, or it would be used again without
    # being seen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    worker = [sys.executable, "-m", "longspan.launch.workers.peak_memory"]
    arguments = [benchmark, json.dumps(candidate), str(warmup_tokens)]
    done = subprocess.run(
        [*worker, *arguments], env=environment, check=False, stdout=subprocess.PIPE, text=True
    )
    return None if done.returncode else int(done.stdout)


def device() -> str:
    """Return the device that everything is measured on: ``cuda`` if there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Return the device's name, and how many threads torch uses."""
    threads = torch.get_num_threads()
    if device() == "cuda":
        return {"device": torch.cuda.get_device_name(), "threads": threads}

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"device": names[0] if names else platform.processor(), "threads": threads}


def write_report(
    path: Path, settings: Any, timings: Sequence[Timing], packages: Sequence[str]
) -> None:
    """Write settings and timings as JSON, with the machine and the versions of packages.

    Args:
        path: the file.
        settings: a dataclass.
        timings: the candidates.
        packages: besides Python.
    """
    report = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("python", *packages)},
        "settings": asdict(settings),
        "rows": [timing.record() for timing in timings],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def default_dtype() -> str:
    """Return the dtype to measure with on this device."""
    return "bfloat16" if device() == "cuda" else "float32"


def dtype_of(options: Namespace) -> str:
    """Return the dtype of ``--dtype``."""
    return default_dtype() if options.dtype == "auto" else options.dtype


def plot_against_length(
    axes: "Axes", lines: dict[str, dict[int, float]], lengths: list[int], ylabel: str, title: str
) -> None:
    """Plot values against the sequence length, both on logarithmic axes.

    Args:
        axes: to draw to.
        lines: the values of each name by length; a length may be missing.
        lengths: that get a tick.
        ylabel: of the values.
        title: above the axes.
    """
    from matplotlib.ticker import LogFormatter

    for name, values in lines.items():
        axes.plot(list(values), list(values.values()), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel, title=title)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3)
