"""``longspan bench attention``: our softmax attention against dense kernels, each checked before it is timed."""

import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.arguments import check_backend
from ...attention.patterns import Pattern
from ...attention.patterns.expression import parse_pattern
from ...attention.patterns.rules import union_masks
from ...attention.softmax.attend import attend
from ...attention.softmax.backends import BACKENDS
from ...attention.softmax.pieces import groups
from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts, numbers
from ..process import keep_freed_memory
from . import measure
from .measure import STEPS, Measured, Work

CHECKED_TOKENS = 2048
"""Candidates are checked at the measured length, but at no more than this: the reference holds every pair in fp64."""
PATTERNS = ("S2(64, 16, 16)", "Window(1024)")
"""Where none are asked for."""


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
    visible = flex_mask(pattern, settings.heads, settings.kv_heads, measure.device())
    # Uncompiled it would hold every pair.
    blocks = torch.compile(create_block_mask)(
        visible, None, settings.heads, length, length, device=measure.device()
    )
    grouped = settings.heads != settings.kv_heads
    return partial(
        torch.compile(flex_attention, dynamic=False), block_mask=blocks, enable_gqa=grouped
    )


def flex_mask(
    pattern: Pattern, heads: int, kv_heads: int, device: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pattern as FlexAttention's ``mask_mod(batch, query head, query, key)``.

    Where heads differ in nothing but the place of their stripes that place is looked up, so that the mask costs no more with
    many heads.
    """
    group = heads // kv_heads
    rules = [pattern.rules(head) for head in range(kv_heads)]
    if len(groups(pattern, kv_heads)) == 1:
        residues = torch.tensor(
            [[rule.residue for rule in of_head] for of_head in rules], device=device
        )

        def mask(batch, head, query, key):
            own = residues[head // group]
            return union_masks(
                replace(rule, residue=own[i]).mask(query, key) for i, rule in enumerate(rules[0])
            )
    else:

        def mask(batch, head, query, key):
            shown = (union_masks(rule.mask(query, key) for rule in of_head) for of_head in rules)
            return union_masks((head // group == at) & seen for at, seen in enumerate(shown))

    return mask


KINDS = {
    "sdpa": Kind(_sdpa, dense=True, heads_first=True),
    "ours": Kind(_ours, dense=False, heads_first=False),
    "cudnn": Kind(_cudnn, dense=True, heads_first=True),
    "flash-attn": Kind(_flash, dense=True, heads_first=False),
    "flex": Kind(_flex, dense=False, heads_first=True),
}
ON_CPU = ("sdpa", "ours")
REFERENCE = Kind(
    lambda settings, pattern, length: partial(attend, pattern=pattern, backend="reference"),
    False,
    False,
)


@dataclass
class Row(Measured):
    """One candidate at one length, and what was found."""

    candidate: str
    kind: str
    pattern: str
    length: int
    density: float
    share: dict[str, float] | None = None
    """``ratio`` as a share of ``ideal``."""

    @property
    def ideal(self) -> float:
        """How much faster than dense it would be if time went with visible pairs."""
        return 1 / self.density

    def record(self) -> dict:
        return {**super().record(), "ideal": self.ideal}


def bench_attention(options: Namespace) -> None:
    """Measure, print a table, and write ``attention.json`` and ``attention.png`` to the folder ``options.out``."""
    settings = _settings(options)
    out = measure.out_folder(options)
    keep_freed_memory()
    rows = [row for length in settings.lengths for row in _rows(settings, length)]
    with track("measuring", len(rows) * (settings.repeats + 2), of_bytes=False) as advance:
        for length in settings.lengths:
            _measure(settings, [row for row in rows if row.length == length], advance)
    _compare(rows)
    measure.write_report(out / "attention.json", settings, rows, ("torch", "triton", "flash-attn"))
    _draw(rows, settings, out / "attention.png")
    print(_table(rows, settings, measure.machine()))


def _settings(options: Namespace) -> Settings:
    lengths = numbers("--lengths", options.lengths, example="8192,32768")
    given = counts(options, "heads", "kv_heads", "head_dim", "repeats")
    if options.heads % options.kv_heads:
        raise UserError(f"--kv-heads: {options.kv_heads} does not divide --heads {options.heads}")
    patterns, dtype = list(dict.fromkeys(options.pattern or PATTERNS)), measure.dtype_of(options)
    settings = Settings(patterns, sorted(lengths), options.backend, dtype=dtype, **given)
    try:
        check_backend(settings.backend, BACKENDS)
        for text in settings.patterns:
            settings.pattern(text).check(settings.kv_heads, max(lengths))
    except ValueError as error:
        raise UserError(str(error)) from None
    return settings


def _rows(settings: Settings, length: int) -> Iterator[Row]:
    for kind in KINDS if measure.device() == "cuda" else ON_CPU:
        if KINDS[kind].dense:
            yield Row(f"dense ({kind})", kind, "Causal()", length, 1.0)
            continue
        for text in settings.patterns:
            name = text if kind == "ours" else f"{text} ({kind})"
            yield Row(
                name, kind, text, length, settings.pattern(text).density(length, settings.kv_heads)
            )


def _measure(settings: Settings, rows: list[Row], advance: Callable[[int], None]) -> None:
    """Fill in the rows of one length."""
    works: dict[str, Work] = {}

    def make(row: Row) -> Work:
        if row.candidate not in works:
            works[row.candidate] = _work(KINDS[row.kind], settings, row.pattern, row.length)
        return works[row.candidate]

    measure.in_turns(
        rows,
        settings.repeats,
        make=make,
        fault=partial(_fault, settings),
        peak=lambda row: (
            measure.cuda_peak(make(row)) if measure.device() == "cuda" else cpu_peak(settings, row)
        ),
        tensor_bytes=lambda row: _tensor_bytes(settings, row.length),
        advance=advance,
    )


def _work(kind: Kind, settings: Settings, pattern: str, length: int) -> Work:
    function = kind.make(settings, settings.pattern(pattern), length)
    *inputs, upstream = _tensors(settings, length)
    if kind.heads_first:
        *inputs, upstream = (x.transpose(1, 2).contiguous() for x in (*inputs, upstream))
    return measure.step_of(function, inputs, upstream)


def _tensors(settings: Settings, length: int) -> list[Tensor]:
    """``q``, ``k``, ``v`` and the upstream gradient, ``[1, time, heads, dim]``: the same at every call."""
    device, dtype = measure.device(), getattr(torch, settings.dtype)
    random = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, length, heads, settings.head_dim, generator=random, device=device).to(dtype)
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
    names = "output", "gradient of q", "gradient of k", "gradient of v"
    return measure.wrong(zip(names, results, wanted, strict=True), settings.dtype)


def cpu_peak(settings: Settings, row: Row) -> int | None:
    """By how many bytes a fresh process grows while it runs the candidate once; None where that cannot be told."""
    return measure.fresh_peak(__name__, {"settings": asdict(settings), "row": asdict(row)})


def work_of(given: dict, most: int | None = None) -> Work:
    """In the process of :func:`cpu_peak`, of at most so many tokens."""
    settings, row = Settings(**given["settings"]), Row(**given["row"])
    return _work(KINDS[row.kind], settings, row.pattern, min(row.length, most or row.length))


def _compare(rows: list[Row]) -> None:
    """Ratios with dense SDPA at the same length, where both were measured, and their shares of the ideal."""
    measure.compare(rows)
    for row in rows:
        if row.ratio:
            row.share = {step: ratio / row.ideal for step, ratio in row.ratio.items()}


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
    ratios = [
        f"{row.ratio[step]:.2f}x ({row.share[step]:.0%})" if row.ratio else "-" for step in STEPS
    ]
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    multiple = "-" if row.peak_multiple is None else f"{row.peak_multiple:.2f}"
    return (
        f"{times}  {row.ideal:>5.2f}x  {ratios[0]:>14}  {ratios[1]:>14}  {peak:>8}  {multiple:>5}"
    )


def _draw(rows: list[Row], settings: Settings, path: Path) -> None:
    """Left the times against the length, right what share of the ideal each pattern reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = "forward+backward"
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    measured = [row for row in rows if row.seconds]
    lines = {row.candidate: {} for row in measured}
    for row in measured:
        lines[row.candidate][row.length] = 1e3 * row.median[step]
    title = f"{step} on {measure.machine()['device']}"
    measure.plot_against_length(left, lines, settings.lengths, ylabel="milliseconds", title=title)
    bars = [row for row in measured if not KINDS[row.kind].dense and row.share]
    names = list(dict.fromkeys(row.candidate for row in bars))
    width = 0.8 / len(settings.lengths)
    for i, length in enumerate(settings.lengths):
        own = [row for row in bars if row.length == length]
        at = [
            names.index(row.candidate) + (i - (len(settings.lengths) - 1) / 2) * width
            for row in own
        ]
        right.bar(
            at, [100 * row.share[step] for row in own], width * 0.9, label=f"{length:,} tokens"
        )
    right.axhline(100, color="grey", linestyle="--", linewidth=1)
    right.set_xticks(
        range(len(names)), [textwrap.fill(name, 24) for name in names], rotation=15, ha="right"
    )
    right.set(ylabel="% of the ideal, 1 / density", title=f"speed-up over dense (sdpa), {step}")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
