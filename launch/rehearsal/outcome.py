"""What a rehearsal found, as numbers and text that a test or a person can read."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...attention.backend_choice import BackendChoice
from .fake_triton import CompiledVariants
from .recorder import STEADY, Recorder


@dataclass
class Outcome:
    """What a rehearsal found; all counts are of one rank."""

    faults: list[str]
    """What would end the run on a GPU."""
    waits: dict[str, list[str]]
    """For each phase, what makes the host wait for the GPU: "times what, place"."""
    waits_per_layer: float
    """In a step after the first, by layer and microbatch."""
    kernels_per_layer: float
    """Kernels of torch and Triton in a step after the first, by layer and microbatch."""
    launches: dict[str, int]
    """Launches of our Triton kernels in a step after the first."""
    top_kernels: dict[str, int]
    """torch's kernels that are launched most in a step after the first."""
    variants: dict[str, int]
    """How often each Triton kernel is compiled."""
    product_tflop: dict[str, float]
    """10^12 operations of torch's matrix products in a step after the first, by dtype."""
    backends: list[str]
    slow_backends: list[str]
    """Those of them that compute by torch's formulas what kernels refused."""
    collectives: list[dict[str, Any]]
    """Of a step after the first: name, ranks, place, count, bytes, and how many are hidden."""
    peak_bytes: int
    planned_bytes: int
    """What ``longspan plan`` predicts for the GPU that holds most."""
    bytes_at_peak: dict[str, int]
    """By what they hold."""
    places_at_peak: dict[str, int]
    """Bytes by the code that allocated them; the largest."""
    layers: int
    microbatches: int
    seconds: float
    """That the rehearsal took."""


class Peak(NamedTuple):
    """The memory of a step after the first, where it is fullest."""

    bytes: int
    by_kind: dict[str, int]
    """Bytes by what they hold."""
    by_place: dict[str, int]
    """Bytes by the code that allocated them; the largest."""


class Size(NamedTuple):
    """What was rehearsed."""

    layers: int
    microbatches: int


def outcome(
    recorder: Recorder,
    variants: CompiledVariants,
    backends: Counter[BackendChoice],
    size: Size,
    peak: Peak,
    planned: int,
    seconds: float,
) -> Outcome:
    """Return what was recorded, in the form that is reported."""
    per_layer = size.layers * size.microbatches
    kernels = {name: n for (phase, name), n in recorder.kernels.items() if phase == STEADY}
    launches = {name: n for (phase, name), n in recorder.launches.items() if phase == STEADY}
    num_waits = sum(n for (phase, _, _), n in recorder.waits.items() if phase == STEADY)
    waits: dict[str, list[str]] = {phase: [] for phase, _, _ in recorder.waits}
    for (phase, what, place), times in recorder.waits.most_common():
        waits[phase].append(f"{times} {what}, {place}")
    return Outcome(
        faults=[
            f"{phase}: {what}, {place} ({times} times)"
            for (phase, what, place), times in recorder.faults.items()
        ],
        waits=waits,
        waits_per_layer=num_waits / per_layer,
        kernels_per_layer=(sum(kernels.values()) + sum(launches.values())) / per_layer,
        launches=launches,
        top_kernels=dict(Counter(kernels).most_common(15)),
        variants={name: len(kinds) for name, kinds in variants.of_kernel.items()},
        product_tflop={
            dtype: n / 1e12
            for (phase, dtype), n in recorder.product_flops.items()
            if phase == STEADY
        },
        backends=[_described(choice, times) for choice, times in backends.items()],
        slow_backends=[
            _described(choice, times) for choice, times in backends.items() if choice.is_slow
        ],
        collectives=[
            {
                "name": kind.name,
                "ranks": kind.ranks,
                "place": kind.place,
                "count": totals.count,
                "bytes": totals.bytes,
                "hidden": totals.hidden,
            }
            for kind, totals in recorder.collectives.items()
            if kind.phase == STEADY
        ],
        peak_bytes=peak.bytes,
        planned_bytes=planned,
        bytes_at_peak=peak.by_kind,
        places_at_peak=peak.by_place,
        layers=size.layers,
        microbatches=size.microbatches,
        seconds=seconds,
    )


def _described(choice: BackendChoice, times: int) -> str:
    because = f" ({choice.reasons})" if choice.reasons else ""
    return f"{choice.operation} {choice.call}: {choice.backend}, {times} times{because}"
