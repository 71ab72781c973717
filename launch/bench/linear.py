"""``longspan bench linear``: the operation of every linear mixer against the length, beside dense attention."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ...attention.arguments import check_backend
from ...attention.linear.attention import BACKENDS
from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts, numbers
from ..process import keep_freed_memory
from . import linear_candidates, measure
from .linear_candidates import BLOCKS, Width
from .measure import DENSE, STEPS, Measured, Work

BASE_TOKENS = 4096
"""What is constant is told from the shortest length of at least so many: shorter ones are overhead."""
STEP = "forward+backward"


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on, beside the machine."""

    mixers: list[str]
    lengths: list[int]
    dense_up_to: int
    backends: list[str]
    heads: int
    head_dim: int
    dtype: str
    repeats: int

    @property
    def width(self) -> Width:
        return Width(self.heads, self.head_dim, self.dtype)


@dataclass
class Row(Measured):
    """One candidate at one length, and what was found."""

    candidate: str
    mixer: str | None
    """None for dense attention."""
    backend: str | None
    length: int
    tokens_per_second: dict[str, float] | None = None
    constancy: float | None = None
    """Tokens/s of forward and backward, divided by those at the shortest length of at least ``BASE_TOKENS``."""


def bench_linear(options: Namespace) -> None:
    """Measure, print a table, and write ``linear.json`` and ``linear.png`` to the folder ``options.out``."""
    settings = _settings(options)
    out = measure.out_folder(options)
    keep_freed_memory()
    rows = [row for length in settings.lengths for row in _rows(settings, length)]
    checked: dict[tuple, str | None] = {}
    with track("measuring", len(rows) * (settings.repeats + 2), of_bytes=False) as advance:
        for length in settings.lengths:
            _measure(settings, [row for row in rows if row.length == length], checked, advance)
    _compare(rows)
    measure.write_report(
        out / "linear.json", settings, rows, ("torch", "triton", "flash-linear-attention")
    )
    _draw(rows, settings, out / "linear.png")
    print(_table(rows, settings, measure.machine()))


def _settings(options: Namespace) -> Settings:
    lengths = sorted(numbers("--lengths", options.lengths, example="4096,65536"))
    given = counts(options, "dense_up_to", "heads", "head_dim", "repeats")
    mixers = list(dict.fromkeys(options.mixer or BLOCKS))
    for mixer in mixers:
        if mixer not in BLOCKS:
            raise UserError(f"--mixer: there is no linear {mixer!r}, only {', '.join(BLOCKS)}")
    try:
        check_backend(options.backend, BACKENDS)
    except ValueError as error:
        raise UserError(f"--backend: {error}") from None
    backends = [options.backend]
    if options.backend == "auto":
        backends = ["torch", "triton", "fla"] if measure.device() == "cuda" else ["torch"]
    settings = Settings(
        mixers, lengths, backends=backends, dtype=measure.dtype_of(options), **given
    )
    for mixer in mixers:
        try:
            settings.width.design(mixer)
        except ValueError as error:
            raise UserError(f"--heads, --head-dim: no {mixer}: {error}") from None
    return settings


def _rows(settings: Settings, length: int) -> Iterator[Row]:
    dense = Row(DENSE, None, None, length)
    if length > settings.dense_up_to:
        dense.status = f"skipped: longer than --dense-up-to {settings.dense_up_to}"
    yield dense
    for mixer in settings.mixers:
        for backend in settings.backends:
            yield Row(
                mixer if len(settings.backends) == 1 else f"{mixer} ({backend})",
                mixer,
                backend,
                length,
            )


def _measure(
    settings: Settings,
    rows: list[Row],
    checked: dict[tuple, str | None],
    advance: Callable[[int], None],
) -> None:
    """Fill in the rows of one length. ``checked`` keeps what was found of a candidate at the same number of tokens."""

    def fault(row: Row) -> str | None:
        if row.mixer is None:
            return None
        key = row.mixer, row.backend, min(row.length, linear_candidates.CHECKED_TOKENS)
        if key not in checked:
            checked[key] = linear_candidates.linear_fault(settings.width, *key)
        return checked[key]

    make = partial(
        _work, settings
    )  # anew at every turn: all candidates' tensors of a great length would be too much
    measure.in_turns(
        rows,
        settings.repeats,
        make=make,
        fault=fault,
        peak=lambda row: (
            measure.cuda_peak(make(row)) if measure.device() == "cuda" else cpu_peak(settings, row)
        ),
        tensor_bytes=lambda row: linear_candidates.tensor_bytes(
            settings.width, row.mixer, row.length
        ),
        advance=advance,
    )


def _work(settings: Settings, row: Row, most: int | None = None) -> Work:
    """Of at most so many tokens."""
    length = min(row.length, most or row.length)
    if row.mixer is None:
        return linear_candidates.dense_work(settings.width, length)
    return linear_candidates.linear_work(settings.width, row.mixer, row.backend, length)


def cpu_peak(settings: Settings, row: Row) -> int | None:
    """By how many bytes a fresh process grows while it runs the candidate once; None where that cannot be told."""
    given = {"settings": asdict(settings), "row": asdict(row)}
    return measure.fresh_peak(__name__, given, first=linear_candidates.CHECKED_TOKENS)


def work_of(given: dict, most: int | None = None) -> Work:
    """In the process of :func:`cpu_peak`, of at most so many tokens."""
    return _work(Settings(**given["settings"]), Row(**given["row"]), most)


def _compare(rows: list[Row]) -> None:
    measure.compare(rows)
    base: dict[str, float] = {}
    measured = [row for row in rows if row.seconds]
    for row in measured:
        row.tokens_per_second = {step: row.length / row.median[step] for step in STEPS}
        if row.length >= BASE_TOKENS:
            base.setdefault(row.candidate, row.tokens_per_second[STEP])
    for row in measured:
        if row.candidate in base:
            row.constancy = row.tokens_per_second[STEP] / base[row.candidate]


def _table(rows: list[Row], settings: Settings, machine: dict) -> str:
    width = max(len("mixer"), *(len(row.candidate) for row in rows))
    lines = [
        f"{machine['device']}, {machine['threads']} threads, {settings.dtype}, a width of {settings.heads} heads of "
        f"{settings.head_dim}, backend {', '.join(settings.backends)}; medians of {settings.repeats}",
        "ratio: time of dense (sdpa) / this one's, forward and backward; constancy: tokens/s / those at the shortest length "
        f"of at least {BASE_TOKENS:,}",
        "peak: growth beside the inputs and the upstream gradient; x: in units of the inputs, the output and their gradients",
        f"{'tokens':>9}  {'mixer':<{width}}  {'forward ms':>10}  {'fwd+bwd ms':>10}  {'tokens/s':>9}  {'ratio':>8}  "
        f"{'constancy':>9}  {'peak MiB':>8}  {'x':>5}",
    ]
    for row in rows:
        lines.append(
            f"{row.length:>9,}  {row.candidate:<{width}}  {_numbers(row) if row.seconds else row.status}"
        )
    return "\n".join(lines)


def _numbers(row: Row) -> str:
    times = "  ".join(f"{1e3 * row.median[step]:>10.2f}" for step in STEPS)
    ratio = f"{row.ratio[STEP]:.2f}x" if row.ratio else "-"
    constancy = "-" if row.constancy is None else f"{row.constancy:.2f}"
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    multiple = "-" if row.peak_multiple is None else f"{row.peak_multiple:.2f}"
    rate = f"{row.tokens_per_second[STEP]:,.0f}"
    return f"{times}  {rate:>9}  {ratio:>8}  {constancy:>9}  {peak:>8}  {multiple:>5}"


def _draw(rows: list[Row], settings: Settings, path: Path) -> None:
    """Left tokens/s against the length, right the peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    left.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    right.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    rates: dict[str, dict[int, float]] = {row.candidate: {} for row in rows if row.seconds}
    peaks: dict[str, dict[int, float]] = {name: {} for name in rates}
    for row in rows:
        if row.seconds:
            rates[row.candidate][row.length] = row.tokens_per_second[STEP] / 1e3
        if row.peak_bytes:
            peaks[row.candidate][row.length] = row.peak_bytes / 2**20
    title = f"{STEP} on {measure.machine()['device']}"
    measure.plot_against_length(
        left, rates, settings.lengths, ylabel="thousand tokens/s", title=title
    )
    title = "growth beside the inputs and the upstream gradient"
    measure.plot_against_length(right, peaks, settings.lengths, ylabel="peak MiB", title=title)
    if rates:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)
