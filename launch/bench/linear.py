"""``longspan bench linear``: linear mixers' operations, and dense attention, against length."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...attention.arguments import check_backend
from ...attention.linear.backends import BACKENDS
from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts, numbers, out_folder
from ..process import keep_freed_memory
from ..table import Column, table
from . import linear_candidates, measure
from .linear_candidates import BLOCKS, AttentionWidth
from .measure import DENSE, PASSES, ForwardBackward, Timing

BASE_TOKENS = 4096
"""Constancy is relative to the shortest length of at least this: shorter ones are overhead."""
BOTH_PASSES = "forward+backward"


@dataclass(frozen=True)
class LinearSettings:
    """What a measurement depends on, besides the machine."""

    mixers: list[str]
    lengths: list[int]
    dense_up_to: int
    backends: list[str]
    heads: int
    head_dim: int
    dtype: str
    repeats: int

    @property
    def width(self) -> AttentionWidth:
        return AttentionWidth(self.heads, self.head_dim, self.dtype)


@dataclass
class LinearTiming(Timing):
    """One candidate at one length, and what was measured."""

    candidate: str
    mixer: str | None
    """None for dense attention."""
    backend: str | None
    length: int
    tokens_per_second: dict[str, float] | None = None
    """By pass."""
    constancy: float | None = None
    """Tokens/s of both passes over those at the shortest length of at least ``BASE_TOKENS``."""


class CheckedCandidate(NamedTuple):
    """What a check depends on: lengths of more tokens than are checked share it."""

    mixer: str
    backend: str
    tokens: int


def bench_linear(options: Namespace) -> None:
    """Measure, print a table, and write ``linear.json`` and ``.png`` to ``options.out``."""
    settings = _settings(options)
    out = out_folder(options)
    keep_freed_memory()

    timings = [timing for length in settings.lengths for timing in _candidates(settings, length)]
    faults: dict[CheckedCandidate, str | None] = {}
    with track("measuring", len(timings) * (settings.repeats + 2), of_bytes=False) as advance:
        for length in settings.lengths:
            of_length = [timing for timing in timings if timing.length == length]
            _measure(settings, of_length, faults, advance)
    _compare(timings)

    packages = ("torch", "triton", "flash-linear-attention")
    measure.write_report(out / "linear.json", settings, timings, packages)
    _draw(timings, settings, out / "linear.png")
    print(_table(timings, settings, measure.machine()))


def _settings(options: Namespace) -> LinearSettings:
    lengths = sorted(numbers("--lengths", options.lengths, example="4096,65536"))
    sizes = counts(options, "dense_up_to", "heads", "head_dim", "repeats")
    mixers = list(dict.fromkeys(options.mixer or BLOCKS))
    for mixer in mixers:
        if mixer not in BLOCKS:
            raise UserError(f"--mixer: {mixer!r} is not a linear mixer; known: {', '.join(BLOCKS)}")

    settings = LinearSettings(
        mixers=mixers,
        lengths=lengths,
        backends=_backends(options.backend),
        dtype=measure.dtype_of(options),
        **sizes,
    )
    for mixer in mixers:
        try:
            settings.width.design(mixer)
        except ValueError as error:
            raise UserError(f"--heads, --head-dim: do not fit {mixer}: {error}") from None
    return settings


def _backends(name: str) -> list[str]:
    try:
        check_backend(name, BACKENDS)
    except ValueError as error:
        raise UserError(f"--backend: {error}") from None
    if name != "auto":
        return [name]
    return ["torch", "triton", "fla"] if measure.device() == "cuda" else ["torch"]


def _candidates(settings: LinearSettings, length: int) -> Iterator[LinearTiming]:
    dense = LinearTiming(DENSE, mixer=None, backend=None, length=length)
    if length > settings.dense_up_to:
        dense.status = f"skipped: longer than --dense-up-to {settings.dense_up_to}"
    yield dense

    for mixer in settings.mixers:
        for backend in settings.backends:
            name = mixer if len(settings.backends) == 1 else f"{mixer} ({backend})"
            yield LinearTiming(name, mixer, backend, length)


def _measure(
    settings: LinearSettings,
    timings: list[LinearTiming],
    faults: dict[CheckedCandidate, str | None],
    advance: Callable[[int], None],
) -> None:
    """Fill in the timings of one length.

    Args:
        settings: of the measurement.
        timings: the candidates.
        faults: of the candidates that were checked already; grows.
        advance: see :func:`measure.measure_in_turns`.
    """

    def find_fault(timing: LinearTiming) -> str | None:
        if timing.mixer is None or timing.backend is None:
            return None
        tokens = min(timing.length, linear_candidates.CHECKED_TOKENS)
        candidate = CheckedCandidate(timing.mixer, timing.backend, tokens)
        if candidate not in faults:
            faults[candidate] = linear_candidates.linear_fault(settings.width, *candidate)
        return faults[candidate]

    def peak(timing: LinearTiming) -> int | None:
        if measure.device() == "cuda":
            return measure.cuda_peak(_build(settings, timing))
        return cpu_peak(settings, timing)

    measure.measure_in_turns(
        timings,
        settings.repeats,
        # Anew at every turn: at a great length, the tensors of all candidates do not fit into
        # memory.
        build=partial(_build, settings),
        find_fault=find_fault,
        peak=peak,
        tensor_bytes=lambda timing: linear_candidates.tensor_bytes(
            settings.width, timing.mixer, timing.length
        ),
        advance=advance,
    )


def _build(
    settings: LinearSettings, timing: LinearTiming, max_tokens: int | None = None
) -> ForwardBackward:
    length = min(timing.length, max_tokens or timing.length)
    if timing.mixer is None or timing.backend is None:
        return linear_candidates.dense_call(settings.width, length)
    return linear_candidates.linear_call(settings.width, timing.mixer, timing.backend, length)


def cpu_peak(settings: LinearSettings, timing: LinearTiming) -> int | None:
    """Return the growth in bytes of a fresh process that runs the candidate, None if unknown."""
    candidate = {"settings": asdict(settings), "timing": asdict(timing)}
    return measure.fresh_process_peak(
        "linear", candidate, warmup_tokens=linear_candidates.CHECKED_TOKENS
    )


def build_candidate(candidate: dict, max_tokens: int | None) -> ForwardBackward:
    """Build the call of a candidate of :func:`cpu_peak`, in its process."""
    settings = LinearSettings(**candidate["settings"])
    return _build(settings, LinearTiming(**candidate["timing"]), max_tokens)


def _compare(timings: list[LinearTiming]) -> None:
    """Fill in rates, ratios with dense attention of the same length, and constancy."""
    measure.compare_with_dense(timings)
    base_rates: dict[str, float] = {}  # by candidate; lengths are in ascending order
    for timing in timings:
        median = timing.median
        if median is None:
            continue
        rates = {name: timing.length / median[name] for name in PASSES}
        timing.tokens_per_second = rates
        if timing.length >= BASE_TOKENS:
            base_rates.setdefault(timing.candidate, rates[BOTH_PASSES])

    for timing in timings:
        if timing.tokens_per_second and timing.candidate in base_rates:
            rate = timing.tokens_per_second[BOTH_PASSES]
            timing.constancy = rate / base_rates[timing.candidate]


def _table(timings: list[LinearTiming], settings: LinearSettings, machine: dict[str, Any]) -> str:
    legend = [
        f"{machine['device']}, {machine['threads']} threads, {settings.dtype}, "
        f"a width of {settings.heads} heads of {settings.head_dim}, "
        f"backend {', '.join(settings.backends)}; medians of {settings.repeats}",
        "ratio: time of dense (sdpa) / this one's, forward and backward; "
        f"constancy: tokens/s / those at the shortest length of at least {BASE_TOKENS:,}",
        "peak: growth beside the inputs and the upstream gradient; "
        "x: in units of the inputs, the output and their gradients",
    ]
    columns = {
        "tokens": Column("right", 9),
        "mixer": Column("left"),
        "forward ms": Column("right", 10),
        "fwd+bwd ms": Column("right", 10),
        "tokens/s": Column("right", 9),
        "ratio": Column("right", 8),
        "constancy": Column("right", 9),
        "peak MiB": Column("right", 8),
        "x": Column("right", 5),
    }
    rows: list[list[str]] = [list(columns)]
    for timing in timings:
        cells = _number_cells(timing) if timing.median else [timing.status]
        rows.append([f"{timing.length:,}", timing.candidate, *cells])
    return "\n".join([*legend, table(rows, list(columns.values()))])


def _number_cells(timing: LinearTiming) -> list[str]:
    median = timing.median or {}
    rates = timing.tokens_per_second or {}
    return [
        *(f"{1e3 * median[name]:.2f}" for name in PASSES),
        f"{rates[BOTH_PASSES]:,.0f}",
        f"{timing.ratio[BOTH_PASSES]:.2f}x" if timing.ratio else "-",
        "-" if timing.constancy is None else f"{timing.constancy:.2f}",
        "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.1f}",
        "-" if timing.peak_multiple is None else f"{timing.peak_multiple:.2f}",
    ]


def _draw(timings: list[LinearTiming], settings: LinearSettings, path: Path) -> None:
    """Draw tokens/s against the length to the left, and the peak memory to the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates: dict[str, dict[int, float]] = {}  # thousand tokens/s, by candidate and length
    peaks: dict[str, dict[int, float]] = {}  # MiB
    for timing in timings:
        if timing.tokens_per_second:
            rate = timing.tokens_per_second[BOTH_PASSES] / 1e3
            rates.setdefault(timing.candidate, {})[timing.length] = rate
            peaks.setdefault(timing.candidate, {})
        if timing.peak_bytes:
            peaks[timing.candidate][timing.length] = timing.peak_bytes / 2**20

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    for axes in (left, right):
        axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    title = f"{BOTH_PASSES} on {measure.machine()['device']}"
    measure.plot_against_length(
        left, rates, settings.lengths, ylabel="thousand tokens/s", title=title
    )
    title = "growth beside the inputs and the upstream gradient"
    measure.plot_against_length(right, peaks, settings.lengths, ylabel="peak MiB", title=title)
    if rates:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)
