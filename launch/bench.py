"""``longspan bench attention``: our softmax attention against dense kernels, each checked before it is timed.

All candidates of a length are measured in turns in one process, so that what else the machine does falls on all of them alike.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.arguments import check_backend
from ..attention.expression import parse_pattern
from ..attention.patterns import Pattern
from ..attention.rules import any_of
from ..attention.softmax import attend
from ..attention.stretches import groups
from ..attention.tiles import BACKENDS
from ..trainer.errors import UserError
from ..trainer.progress import track
from .process import keep_freed_memory

CHECKED_TOKENS = 2048
"""Candidates are checked at the measured length, but at no more than this: the reference holds every pair in fp64."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative error that is allowed; on CUDA products of fp32 may be those of TF32."""
PATTERNS = ("S2(64, 16, 16)", "Window(1024)")
"""Where none are asked for."""
STEPS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on, beside the machine."""

    patterns: list[str]
    lengths: list[int]
    backend: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    repeats: int

    def pattern(self, text: str) -> Pattern:
        """As a model with so many KV heads would have it."""
        return parse_pattern(text).spread(self.kv_heads)


class Kind(NamedTuple):
    """An implementation."""

    make: Callable[[Settings, Pattern, int], Callable[[Tensor, Tensor, Tensor], Tensor]]
    """``make(settings, pattern, length) -> function(q, k, v)``: what is done once for a length is done here."""
    dense: bool
    """Whether it knows no pattern but all keys up to the query's own."""
    heads_first: bool
    """Whether it takes ``[batch, heads, time, dim]``."""


def _ours(settings: Settings, pattern: Pattern, length: int):
    return partial(attend, pattern=pattern, backend=settings.backend)


def _sdpa(settings: Settings, pattern: Pattern, length: int):
    grouped = settings.heads != settings.kv_heads
    return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)


def _cudnn(settings: Settings, pattern: Pattern, length: int):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(_sdpa(settings, pattern, length))


def _flash(settings: Settings, pattern: Pattern, length: int):
    from flash_attn import flash_attn_func

    return partial(flash_attn_func, causal=True)


def _flex(settings: Settings, pattern: Pattern, length: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 1000  # compiled anew for every pattern and length
    visible = flex_mask(pattern, settings.heads, settings.kv_heads, _device())
    # Uncompiled it would hold every pair.
    blocks = torch.compile(create_block_mask)(visible, None, settings.heads, length, length, device=_device())
    grouped = settings.heads != settings.kv_heads
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks, enable_gqa=grouped)


def flex_mask(pattern: Pattern, heads: int, kv_heads: int, device: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pattern as FlexAttention's ``mask_mod(batch, query head, query, key)``.

    Where heads differ in nothing but the place of their stripes that place is looked up, so that the mask costs no more with
    many heads.
    """
    group = heads // kv_heads
    rules = [pattern.rules(head) for head in range(kv_heads)]
    if len(groups(pattern, kv_heads)) == 1:
        residues = torch.tensor([[rule.residue for rule in of_head] for of_head in rules], device=device)

        def mask(batch, head, query, key):
            own = residues[head // group]
            return any_of(replace(rule, residue=own[i]).mask(query, key) for i, rule in enumerate(rules[0]))
    else:

        def mask(batch, head, query, key):
            shown = (any_of(rule.mask(query, key) for rule in of_head) for of_head in rules)
            return any_of((head // group == at) & seen for at, seen in enumerate(shown))

    return mask


KINDS = {
    "sdpa": Kind(_sdpa, dense=True, heads_first=True),
    "ours": Kind(_ours, dense=False, heads_first=False),
    "cudnn": Kind(_cudnn, dense=True, heads_first=True),
    "flash-attn": Kind(_flash, dense=True, heads_first=False),
    "flex": Kind(_flex, dense=False, heads_first=True),
}
ON_CPU = ("sdpa", "ours")
REFERENCE = Kind(lambda settings, pattern, length: partial(attend, pattern=pattern, backend="reference"), False, False)


@dataclass
class Row:
    """One candidate at one length, and what was found."""

    candidate: str
    kind: str
    pattern: str
    length: int
    density: float
    status: str = "measured"
    """Or why it was not: ``wrong: ...`` or ``cannot run: ...``, with no numbers beside it."""
    seconds: dict[str, list[float]] | None = None
    """Of every repeat: ``forward``, and ``forward+backward``."""
    peak_bytes: int | None = None
    """By how much memory grew in one forward and backward, beside ``q``, ``k``, ``v`` and the upstream gradient; None on a
    CPU whose system does not tell."""
    peak_multiple: float | None = None
    """The same in units of the bytes of ``q``, ``k``, ``v``, the output and the gradients of these four."""
    ratio: dict[str, float] | None = None
    """Median time of dense SDPA divided by this one's."""
    share: dict[str, float] | None = None
    """``ratio`` as a share of ``ideal``."""

    @property
    def ideal(self) -> float:
        """How much faster than dense it would be if time went with visible pairs."""
        return 1 / self.density

    @property
    def median(self) -> dict[str, float]:
        return {step: statistics.median(times) for step, times in self.seconds.items()}


def bench_attention(options: Namespace) -> None:
    """Measure, print a table, and write ``attention.json`` and ``attention.png`` to the folder ``options.out``."""
    settings = _settings(options)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made: {error}") from None
    keep_freed_memory()
    rows = [row for length in settings.lengths for row in _rows(settings, length)]
    with track("measuring", len(rows) * (settings.repeats + 2), of_bytes=False) as advance:
        for length in settings.lengths:
            _measure(settings, [row for row in rows if row.length == length], advance)
    _compare(rows)
    report = {"machine": _machine(), "versions": _versions(), "settings": asdict(settings), "rows": list(map(_record, rows))}
    out.joinpath("attention.json").write_text(json.dumps(report, indent=1) + "\n")
    _draw(rows, settings, out / "attention.png")
    print(_table(rows, settings, report["machine"]))


def _settings(options: Namespace) -> Settings:
    try:
        lengths = [int(length) for length in options.lengths.split(",")]
    except ValueError:
        raise UserError(f"--lengths: must be whole numbers, as 8192,32768, got {options.lengths!r}") from None
    dtype = ("bfloat16" if _device() == "cuda" else "float32") if options.dtype == "auto" else options.dtype
    counts = {name: getattr(options, name) for name in ("heads", "kv_heads", "head_dim", "repeats")}
    for name, value in [*counts.items(), *(("lengths", length) for length in lengths)]:
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    if options.heads % options.kv_heads:
        raise UserError(f"--kv-heads: {options.kv_heads} does not divide --heads {options.heads}")
    settings = Settings(
        list(dict.fromkeys(options.pattern or PATTERNS)), sorted(set(lengths)), options.backend, dtype=dtype, **counts
    )
    try:
        check_backend(settings.backend, BACKENDS)
        for text in settings.patterns:
            settings.pattern(text).check(settings.kv_heads, max(lengths))
    except ValueError as error:
        raise UserError(str(error)) from None
    return settings


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rows(settings: Settings, length: int) -> Iterator[Row]:
    for kind in KINDS if _device() == "cuda" else ON_CPU:
        if KINDS[kind].dense:
            yield Row(f"dense ({kind})", kind, "Causal()", length, 1.0)
            continue
        for text in settings.patterns:
            name = text if kind == "ours" else f"{text} ({kind})"
            yield Row(name, kind, text, length, settings.pattern(text).density(length, settings.kv_heads))


def _measure(settings: Settings, rows: list[Row], advance: Callable[[int], None]) -> None:
    """Fill in the rows of one length."""
    works = {}
    for row in rows:
        try:
            row.status = _fault(settings, row) or row.status
            if row.status == "measured":
                work = _work(KINDS[row.kind], settings, row.pattern, row.length)
                work()  # compiles, and takes memory from the system
                works[row.candidate], row.seconds = work, {step: [] for step in STEPS}
        except Exception as error:
            row.status = f"cannot run: {_one_line(error)}"
        advance(1)
    for _ in range(settings.repeats):
        for row in rows:
            if row.candidate in works:
                for step, seconds in zip(STEPS, _timed(works[row.candidate]), strict=True):
                    row.seconds[step].append(seconds)
            advance(1)
    for row in rows:
        if row.candidate in works:
            row.peak_bytes = cuda_peak(works[row.candidate]) if _device() == "cuda" else cpu_peak(settings, row)
            row.peak_multiple = row.peak_bytes and row.peak_bytes / _tensor_bytes(settings, row.length)
        advance(1)


def _one_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:160]}" if said else type(error).__name__


def _work(kind: Kind, settings: Settings, pattern: str, length: int) -> Callable[..., tuple[Tensor, ...]]:
    """``work(between=None)`` goes forward, calls ``between()`` and goes backward; it gives the output and the gradients."""
    function = kind.make(settings, settings.pattern(pattern), length)
    *inputs, upstream = _tensors(settings, length)
    if kind.heads_first:
        *inputs, upstream = (x.transpose(1, 2).contiguous() for x in (*inputs, upstream))
    for x in inputs:
        x.requires_grad_()

    def work(between: Callable[[], None] | None = None) -> tuple[Tensor, ...]:
        out = function(*inputs)
        if between:
            between()
        return (out.detach(), *torch.autograd.grad(out, inputs, upstream))

    return work


def _tensors(settings: Settings, length: int) -> list[Tensor]:
    """``q``, ``k``, ``v`` and the upstream gradient, ``[1, time, heads, dim]``: the same at every call."""
    random = torch.Generator(_device()).manual_seed(0)
    return [
        torch.randn(1, length, heads, settings.head_dim, generator=random, device=_device()).to(getattr(torch, settings.dtype))
        for heads in (settings.heads, settings.kv_heads, settings.kv_heads, settings.heads)
    ]


def _tensor_bytes(settings: Settings, length: int) -> int:
    """Of ``q``, ``k``, ``v``, the output and their gradients."""
    itemsize = getattr(torch, settings.dtype).itemsize
    return 2 * 2 * (settings.heads + settings.kv_heads) * length * settings.head_dim * itemsize


def _fault(settings: Settings, row: Row) -> str | None:
    """What is wrong with a candidate's output or gradients, compared with the reference."""
    length = min(row.length, CHECKED_TOKENS)
    kind = KINDS[row.kind]
    results = _work(kind, settings, row.pattern, length)()
    if kind.heads_first:
        results = [x.transpose(1, 2) for x in results]
    wanted = _work(REFERENCE, settings, row.pattern, length)()
    for name, result, want in zip(("output", "gradient of q", "gradient of k", "gradient of v"), results, wanted, strict=True):
        error, allowed = _relative_error(result, want), TOLERANCE[settings.dtype]
        if not error <= allowed:  # nor NaN
            return f"wrong: {name} at {length:,} tokens has a relative error of {error:.2g}, {allowed:g} is allowed"
    return None


def _relative_error(result: Tensor, want: Tensor) -> float:
    """The worst of any head in any sixteenth of the time: gradients of late keys are small beside those of the first."""
    parts = zip(result.double().chunk(16, 1), want.double().chunk(16, 1), strict=True)
    errors = [(got - right).norm(dim=(1, 3)) / right.norm(dim=(1, 3)).clamp_min(1e-6) for got, right in parts]
    return torch.stack(errors).max().item()


def _timed(work: Callable[..., tuple[Tensor, ...]]) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward."""
    if _device() == "cpu":
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


def cuda_peak(work: Callable[..., tuple[Tensor, ...]]) -> int:
    """By how many bytes the memory in use grows while it runs."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(settings: Settings, row: Row) -> int | None:
    """By how many bytes a fresh process grows while it runs the candidate once; None where that cannot be told."""
    code = "import sys; from longspan.launch.bench import print_growth; print_growth(sys.argv[1])"
    argument = json.dumps({"settings": asdict(settings), "row": asdict(row)})
    # What is freed before must go back to the system, or it would be used again unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    return None if done.returncode else int(done.stdout)


def print_growth(argument: str) -> None:
    """The process of :func:`cpu_peak`."""
    given = json.loads(argument)
    settings, row = Settings(**given["settings"]), Row(**given["row"])
    _work(KINDS[row.kind], settings, row.pattern, min(row.length, 128))()  # loads what torch loads at first use
    work = _work(KINDS[row.kind], settings, row.pattern, row.length)
    with suppress(OSError):  # where it is not permitted the peak so far is hardly more
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = _peak_resident()
    work()
    print(_peak_resident() - before)


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def _compare(rows: list[Row]) -> None:
    """Ratios with dense SDPA at the same length, where both were measured."""
    dense = {row.length: row.median for row in rows if row.kind == "sdpa" and row.seconds}
    for row in rows:
        if row.seconds and row.length in dense:
            row.ratio = {step: dense[row.length][step] / row.median[step] for step in STEPS}
            row.share = {step: ratio / row.ideal for step, ratio in row.ratio.items()}


def _record(row: Row) -> dict:
    return {**asdict(row), "ideal": row.ideal, "median": row.seconds and row.median}


def _machine() -> dict:
    if _device() == "cuda":
        return {"device": torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"device": names[0] if names else platform.processor(), "threads": torch.get_num_threads()}


def _versions() -> dict[str, str | None]:
    """Of what was measured; None for a package that is not there."""
    return {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "triton", "flash-attn")}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _table(rows: list[Row], settings: Settings, machine: dict) -> str:
    width = max(len("candidate"), *(len(row.candidate) for row in rows))
    columns = f"{'tokens':>9}  {'candidate':<{width}}"
    lines = [
        f"{machine['device']}, {machine['threads']} threads, {settings.dtype}, {settings.heads} heads ({settings.kv_heads} KV) "
        f"of {settings.head_dim}, backend {settings.backend}; medians of {settings.repeats}",
        "ratio: time of dense (sdpa) / this one's, in brackets the share of the ideal, 1 / density",
        "peak: growth beside q, k, v and the upstream gradient; x: in units of q, k, v, o and their gradients",
        f"{columns}  {'forward ms':>10}  {'fwd+bwd ms':>10}  {'ideal':>6}  {'forward ratio':>14}  {'fwd+bwd ratio':>14}  "
        f"{'peak MiB':>8}  {'x':>5}",
    ]
    for row in rows:
        start = f"{row.length:>9,}  {row.candidate:<{width}}"
        lines.append(f"{start}  {_numbers(row) if row.seconds else row.status}")
    return "\n".join(lines)


def _numbers(row: Row) -> str:
    times = "  ".join(f"{1e3 * row.median[step]:>10.2f}" for step in STEPS)
    ratios = [f"{row.ratio[step]:.2f}x ({row.share[step]:.0%})" if row.ratio else "-" for step in STEPS]
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    multiple = "-" if row.peak_multiple is None else f"{row.peak_multiple:.2f}"
    return f"{times}  {row.ideal:>5.2f}x  {ratios[0]:>14}  {ratios[1]:>14}  {peak:>8}  {multiple:>5}"


def _draw(rows: list[Row], settings: Settings, path: Path) -> None:
    """Left the times against the length, right what share of the ideal each pattern reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    step = "forward+backward"
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    measured = [row for row in rows if row.seconds]
    for name in dict.fromkeys(row.candidate for row in measured):
        own = [row for row in measured if row.candidate == name]
        left.plot([row.length for row in own], [1e3 * row.median[step] for row in own], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=f"{step} on {_machine()['device']}")
    left.set_xticks(settings.lengths, [f"{length:,}" for length in settings.lengths])
    left.xaxis.minorticks_off()
    left.yaxis.set_major_formatter(LogFormatter())
    left.yaxis.set_minor_formatter(LogFormatter())
    left.grid(alpha=0.3)
    bars = [row for row in measured if not KINDS[row.kind].dense and row.share]
    names = list(dict.fromkeys(row.candidate for row in bars))
    width = 0.8 / len(settings.lengths)
    for i, length in enumerate(settings.lengths):
        own = [row for row in bars if row.length == length]
        at = [names.index(row.candidate) + (i - (len(settings.lengths) - 1) / 2) * width for row in own]
        right.bar(at, [100 * row.share[step] for row in own], width * 0.9, label=f"{length:,} tokens")
    right.axhline(100, color="grey", linestyle="--", linewidth=1)
    right.set_xticks(range(len(names)), [textwrap.fill(name, 24) for name in names], rotation=15, ha="right")
    right.set(ylabel="% of the ideal, 1 / density", title=f"speed-up over dense (sdpa), {step}")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
