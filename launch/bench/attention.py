"""``longspan bench attention``: softmax attention against dense kernels, checked, then timed."""

import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.arguments import check_backend
from ...attention.patterns import ClosedFormPattern
from ...attention.patterns.expression import parse_pattern
from ...attention.patterns.rules import union_masks
from ...attention.softmax.attend import attend
from ...attention.softmax.backends import BACKENDS
from ...attention.softmax.pieces import group_heads
from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts, numbers, out_folder
from ..process import keep_freed_memory
from ..table import Column, table
from . import measure
from .measure import PASSES, Comparison, ForwardBackward, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHECKED_TOKENS = 2048
"""Longest checked length, at most that measured: the reference holds every pair in fp64."""
PATTERNS = ("S2(64, 16, 16)", "Window(1024)")
"""Measured by default."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``attention(q, k, v)``."""


@dataclass(frozen=True)
class AttentionSettings:
    """What a measurement depends on, besides the machine."""

    patterns: list[str]
    lengths: list[int]
    backend: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    repeats: int

    def pattern(self, expression: str) -> ClosedFormPattern:
        """Return the pattern as a model with this many KV heads would have it."""
        return parse_pattern(expression).spread(self.kv_heads)


class Implementation(NamedTuple):
    """An implementation of attention."""

    make: Callable[[AttentionSettings, ClosedFormPattern, int], Attention]
    """``make(settings, pattern, length)`` prepares the attention of a length, and returns it."""
    dense: bool
    """Whether it knows no pattern: every query sees all keys up to its own."""
    heads_first: bool
    """Whether its tensors are ``[batch, heads, time, dim]``, not ``[batch, time, heads, dim]``."""


def _attend(pattern: ClosedFormPattern, backend: str) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, pattern, backend=backend)
        assert isinstance(out, Tensor)  # a tuple only with return_lse
        return out

    return attention


def _ours(settings: AttentionSettings, pattern: ClosedFormPattern, length: int) -> Attention:
    return _attend(pattern, settings.backend)


def _sdpa(settings: AttentionSettings, pattern: ClosedFormPattern, length: int) -> Attention:
    grouped = settings.heads != settings.kv_heads
    return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)


def _cudnn(settings: AttentionSettings, pattern: ClosedFormPattern, length: int) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(_sdpa(settings, pattern, length))


def _flash(settings: AttentionSettings, pattern: ClosedFormPattern, length: int) -> Attention:
    from flash_attn import flash_attn_func

    return partial(flash_attn_func, causal=True)


def _flex(settings: AttentionSettings, pattern: ClosedFormPattern, length: int) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 1000  # compiled anew for every pattern and length
    mask = flex_mask(pattern, settings.heads, settings.kv_heads, measure.device())
    # Without compilation it would hold every pair.
    blocks = torch.compile(create_block_mask)(
        mask, None, settings.heads, length, length, device=measure.device()
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = settings.heads != settings.kv_heads
    return partial(compiled, block_mask=blocks, enable_gqa=grouped)


def _reference(settings: AttentionSettings, pattern: ClosedFormPattern, length: int) -> Attention:
    return _attend(pattern, "reference")


IMPLEMENTATIONS = {
    "sdpa": Implementation(_sdpa, dense=True, heads_first=True),
    "ours": Implementation(_ours, dense=False, heads_first=False),
    "cudnn": Implementation(_cudnn, dense=True, heads_first=True),
    "flash-attn": Implementation(_flash, dense=True, heads_first=False),
    "flex": Implementation(_flex, dense=False, heads_first=True),
}
ON_CPU = ("sdpa", "ours")
REFERENCE = Implementation(_reference, dense=False, heads_first=False)


def flex_mask(
    pattern: ClosedFormPattern, heads: int, kv_heads: int, device: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the pattern as FlexAttention's ``mask_mod(batch, query_head, query, key)``.

    If KV heads differ only in the residue of their stripes, the residue is looked up, so that many
    heads cost no more.
    """
    group_size = heads // kv_heads
    rules_of_head = [pattern.rules(head) for head in range(kv_heads)]

    if len(group_heads(pattern, kv_heads)) == 1:
        residues = torch.tensor(
            [[rule.residue for rule in rules] for rules in rules_of_head], device=device
        )

        def mask_by_residue(batch, query_head, query, key):
            residue = residues[query_head // group_size]  # [rules]
            # A rule's mask computes with a tensor as with an int.
            return union_masks(
                replace(rule, residue=cast(int, residue[i])).mask(query, key)
                for i, rule in enumerate(rules_of_head[0])
            )

        return mask_by_residue

    def mask_by_head(batch, query_head, query, key):
        visible = (union_masks(rule.mask(query, key) for rule in rules) for rules in rules_of_head)
        return union_masks(
            (query_head // group_size == kv_head) & mask for kv_head, mask in enumerate(visible)
        )

    return mask_by_head


@dataclass
class AttentionTiming(Timing):
    """One candidate at one length, and what was measured."""

    candidate: str
    kind: str
    """Key of :data:`IMPLEMENTATIONS`."""
    pattern: str
    length: int
    density: float
    """Visible share of the causal triangle."""
    share: dict[str, float] | None = None
    """``ratio`` as a share of ``ideal``, by pass."""

    @property
    def ideal(self) -> float:
        """Speed-up over dense attention if time were proportional to visible pairs."""
        return 1 / self.density

    def record(self) -> dict:
        return {**super().record(), "ideal": self.ideal}


def bench_attention(options: Namespace) -> None:
    """Measure, print a table, and write ``attention.json`` and ``.png`` to ``options.out``."""
    settings = _settings(options)
    out = out_folder(options)
    keep_freed_memory()

    timings = [timing for length in settings.lengths for timing in _candidates(settings, length)]
    with track("measuring", len(timings) * (settings.repeats + 2), of_bytes=False) as advance:
        for length in settings.lengths:
            of_length = [timing for timing in timings if timing.length == length]
            _measure(settings, of_length, advance)
    _compare(timings)

    packages = ("torch", "triton", "flash-attn")
    measure.write_report(out / "attention.json", settings, timings, packages)
    _draw(timings, settings, out / "attention.png")
    print(_table(timings, settings, measure.machine()))


def _settings(options: Namespace) -> AttentionSettings:
    lengths = numbers("--lengths", options.lengths, example="8192,32768")
    sizes = counts(options, "heads", "kv_heads", "head_dim", "repeats")
    if options.heads % options.kv_heads:
        raise UserError(f"--kv-heads: {options.kv_heads} does not divide --heads {options.heads}")

    settings = AttentionSettings(
        patterns=list(dict.fromkeys(options.pattern or PATTERNS)),
        lengths=sorted(lengths),
        backend=options.backend,
        dtype=measure.dtype_of(options),
        **sizes,
    )
    try:
        check_backend(settings.backend, BACKENDS)
        for expression in settings.patterns:
            settings.pattern(expression).check(settings.kv_heads, max(lengths))
    except ValueError as error:
        raise UserError(str(error)) from None
    return settings


def _candidates(settings: AttentionSettings, length: int) -> Iterator[AttentionTiming]:
    for kind in IMPLEMENTATIONS if measure.device() == "cuda" else ON_CPU:
        if IMPLEMENTATIONS[kind].dense:
            yield AttentionTiming(f"dense ({kind})", kind, "Causal()", length, density=1.0)
            continue
        for expression in settings.patterns:
            name = expression if kind == "ours" else f"{expression} ({kind})"
            density = settings.pattern(expression).density(length, settings.kv_heads)
            yield AttentionTiming(name, kind, expression, length, density)


def _measure(
    settings: AttentionSettings, timings: list[AttentionTiming], advance: Callable[[int], None]
) -> None:
    """Fill in the timings of one length."""
    calls: dict[str, ForwardBackward] = {}

    def build(timing: AttentionTiming) -> ForwardBackward:
        if timing.candidate not in calls:
            implementation = IMPLEMENTATIONS[timing.kind]
            calls[timing.candidate] = _build(
                implementation, settings, timing.pattern, timing.length
            )
        return calls[timing.candidate]

    def peak(timing: AttentionTiming) -> int | None:
        if measure.device() == "cuda":
            return measure.cuda_peak(build(timing))
        return cpu_peak(settings, timing)

    measure.measure_in_turns(
        timings,
        settings.repeats,
        build=build,
        find_fault=partial(_find_fault, settings),
        peak=peak,
        tensor_bytes=lambda timing: _tensor_bytes(settings, timing.length),
        advance=advance,
    )


def _build(
    implementation: Implementation, settings: AttentionSettings, pattern: str, length: int
) -> ForwardBackward:
    attention = implementation.make(settings, settings.pattern(pattern), length)
    *inputs, grad_out = _tensors(settings, length)
    if implementation.heads_first:
        *inputs, grad_out = (x.transpose(1, 2).contiguous() for x in (*inputs, grad_out))
    return measure.forward_backward(attention, inputs, grad_out)


def _tensors(settings: AttentionSettings, length: int) -> list[Tensor]:
    """Return q, k, v and the output's gradient, ``[1, time, heads, dim]``, always the same."""
    device = measure.device()
    dtype = getattr(torch, settings.dtype)
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, length, heads, settings.head_dim, generator=generator, device=device).to(
            dtype
        )
        for heads in (settings.heads, settings.kv_heads, settings.kv_heads, settings.heads)
    ]


def _tensor_bytes(settings: AttentionSettings, length: int) -> int:
    """Return the bytes of q, k, v, the output and their gradients."""
    itemsize = getattr(torch, settings.dtype).itemsize
    heads = 2 * (settings.heads + settings.kv_heads)  # of q and the output, of k and v
    return 2 * heads * length * settings.head_dim * itemsize


def _find_fault(settings: AttentionSettings, timing: AttentionTiming) -> str | None:
    """Return how the output or gradients differ from the reference, or None if they are right."""
    length = min(timing.length, CHECKED_TOKENS)
    implementation = IMPLEMENTATIONS[timing.kind]
    results = _build(implementation, settings, timing.pattern, length)()
    if implementation.heads_first:
        results = tuple(x.transpose(1, 2) for x in results)
    expected = _build(REFERENCE, settings, timing.pattern, length)()

    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    triples = zip(names, results, expected, strict=True)
    return measure.first_fault((Comparison(*triple) for triple in triples), settings.dtype)


def cpu_peak(settings: AttentionSettings, timing: AttentionTiming) -> int | None:
    """Return the growth in bytes of a fresh process that runs the candidate, None if unknown."""
    candidate = {"settings": asdict(settings), "timing": asdict(timing)}
    return measure.fresh_process_peak("attention", candidate)


def build_candidate(candidate: dict, max_tokens: int | None) -> ForwardBackward:
    """Build the call of a candidate of :func:`cpu_peak`, in its process."""
    settings = AttentionSettings(**candidate["settings"])
    timing = AttentionTiming(**candidate["timing"])
    length = min(timing.length, max_tokens or timing.length)
    return _build(IMPLEMENTATIONS[timing.kind], settings, timing.pattern, length)


def _compare(timings: list[AttentionTiming]) -> None:
    """Fill in the ratios with dense SDPA of the same length, and their shares of the ideal."""
    measure.compare_with_dense(timings)
    for timing in timings:
        if timing.ratio:
            timing.share = {name: ratio / timing.ideal for name, ratio in timing.ratio.items()}


def _table(
    timings: list[AttentionTiming], settings: AttentionSettings, machine: dict[str, Any]
) -> str:
    legend = [
        f"{machine['device']}, {machine['threads']} threads, {settings.dtype}, "
        f"{settings.heads} heads ({settings.kv_heads} KV) of {settings.head_dim}, "
        f"backend {settings.backend}; medians of {settings.repeats}",
        "ratio: time of dense (sdpa) / this one's, in brackets the share of the ideal, 1 / density",
        "peak: growth beside q, k, v and the upstream gradient; "
        "x: in units of q, k, v, o and their gradients",
    ]
    columns = {
        "tokens": Column("right", 9),
        "candidate": Column("left"),
        "forward ms": Column("right", 10),
        "fwd+bwd ms": Column("right", 10),
        "ideal": Column("right", 6),
        "forward ratio": Column("right", 14),
        "fwd+bwd ratio": Column("right", 14),
        "peak MiB": Column("right", 8),
        "x": Column("right", 5),
    }
    rows: list[list[str]] = [list(columns)]
    for timing in timings:
        cells = _number_cells(timing) if timing.median else [timing.status]
        rows.append([f"{timing.length:,}", timing.candidate, *cells])
    return "\n".join([*legend, table(rows, list(columns.values()))])


def _number_cells(timing: AttentionTiming) -> list[str]:
    median = timing.median or {}
    return [
        *(f"{1e3 * median[name]:.2f}" for name in PASSES),
        f"{timing.ideal:.2f}x",
        *(_ratio_cell(timing, name) for name in PASSES),
        "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.1f}",
        "-" if timing.peak_multiple is None else f"{timing.peak_multiple:.2f}",
    ]


def _ratio_cell(timing: AttentionTiming, name: str) -> str:
    if not timing.ratio or not timing.share:
        return "-"
    return f"{timing.ratio[name]:.2f}x ({timing.share[name]:.0%})"


def _draw(timings: list[AttentionTiming], settings: AttentionSettings, path: Path) -> None:
    """Draw times against length to the left, and shares of the ideal speed-up to the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    _draw_times(left, timings, settings)
    _draw_shares(right, timings, settings)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


_DRAWN_PASS = "forward+backward"


def _draw_times(axes: "Axes", timings: list[AttentionTiming], settings: AttentionSettings) -> None:
    lines: dict[str, dict[int, float]] = {}
    for timing in timings:
        if timing.median:
            milliseconds = 1e3 * timing.median[_DRAWN_PASS]
            lines.setdefault(timing.candidate, {})[timing.length] = milliseconds
    title = f"{_DRAWN_PASS} on {measure.machine()['device']}"
    measure.plot_against_length(axes, lines, settings.lengths, ylabel="milliseconds", title=title)


def _draw_shares(axes: "Axes", timings: list[AttentionTiming], settings: AttentionSettings) -> None:
    """Draw a group of bars for each candidate that knows its pattern, a bar for each length."""
    percentages: dict[str, dict[int, float]] = {}  # by candidate and length
    for timing in timings:
        if timing.share and not IMPLEMENTATIONS[timing.kind].dense:
            percentage = 100 * timing.share[_DRAWN_PASS]
            percentages.setdefault(timing.candidate, {})[timing.length] = percentage

    names = list(percentages)
    width = 0.8 / len(settings.lengths)
    for i, length in enumerate(settings.lengths):
        offset = (i - (len(settings.lengths) - 1) / 2) * width
        bars = {
            number + offset: percentages[name][length]
            for number, name in enumerate(names)
            if length in percentages[name]
        }
        axes.bar(list(bars), list(bars.values()), width * 0.9, label=f"{length:,} tokens")

    axes.axhline(100, color="grey", linestyle="--", linewidth=1)
    labels = [textwrap.fill(name, 24) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=15, ha="right")
    axes.set(
        ylabel="% of the ideal, 1 / density", title=f"speed-up over dense (sdpa), {_DRAWN_PASS}"
    )
