"""What a rehearsal found, as text for a person. Without torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...trainer.predict.estimate import GIB, Device
from ...trainer.recipe.schema import Recipe
from ..table import table

_MOST_PLACES = 8
"""Lines of a list that are printed."""
_BEFORE_STEPS = ("build", "start")
"""Phases in which the host may wait."""


@dataclass(frozen=True)
class RehearsalReport:
    """What :class:`.outcome.Outcome` has, in sections of lines."""

    found: dict[str, Any]
    """The fields of an outcome."""
    recipe: Recipe
    device: Device
    rank: int
    documents: int

    def __str__(self) -> str:
        sections = [
            self._headline(),
            _listed("would fail", self.found["faults"]),
            _listed("backends", self.found["backends"]),
            *self._waits(),
            self._kernels(),
            self._messages(),
            self._memory(),
        ]
        return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)

    def _headline(self) -> Iterator[str]:
        recipe = self.recipe
        parallel = recipe.parallel
        training = recipe.training
        yield (
            f"rehearsed rank {self.rank} of {recipe.launch.processes} x {self.device.name} "
            f"(dp {recipe.data_parallel} x cp {parallel.cp} x pp {parallel.pp} "
            f"x tp {parallel.tp}); nothing was computed"
        )
        yield (
            f"{self.found['layers']} layers, {self.found['microbatches']} microbatches of "
            f"{training.micro_batch_size} x {training.seq_length:,} tokens, "
            f"{self.documents:,} documents in each sequence"
        )

    def _waits(self) -> Iterator[Iterable[str]]:
        for phase, waits in self.found["waits"].items():
            if phase not in _BEFORE_STEPS:
                yield _listed(f"the host waits, {phase}", waits)

    def _kernels(self) -> Iterator[str]:
        found = self.found
        yield f"kernels: {found['kernels_per_layer']:,.0f} a layer and microbatch"
        for name, count in found["launches"].items():
            variants = found["variants"][name]
            yield f"  {count:,} {name} (Triton; compiled for {variants} kinds of arguments)"
        for name, count in list(found["top_kernels"].items())[:_MOST_PLACES]:
            yield f"  {count:,} {name}"
        products = ", ".join(f"{n:,.1f} TFLOP in {x}" for x, n in found["product_tflop"].items())
        yield f"torch's matrix products: {products or 'none'}"

    def _messages(self) -> Iterator[str]:
        if not self.found["collectives"]:
            return
        rows = [("ranks", "times", "MiB", "beside kernels", "kind", "place")]
        rows += [
            (
                str(kind["ranks"]),
                str(kind["count"]),
                f"{kind['bytes'] / 2**20:,.1f}",
                str(kind["hidden"]),
                kind["name"],
                kind["place"].partition(" < ")[0],
            )
            for kind in self.found["collectives"]
        ]
        yield "messages of a step"
        yield table(rows)

    def _memory(self) -> Iterator[str]:
        found = self.found
        peak = found["peak_bytes"]
        planned = found["planned_bytes"]
        verdict = "" if peak < self.device.memory_gib * GIB else ": TOO MUCH"
        yield (
            f"memory at the peak: {peak / GIB:,.2f} of {self.device.memory_gib:g} GiB{verdict}; "
            f"longspan plan says {planned / GIB:,.2f} ({planned / peak - 1:+.1%})"
        )
        for kind, size in found["bytes_at_peak"].items():
            yield f"  {size / GIB:8,.2f} GiB {kind}"
        yield "  of these"
        for place, size in list(found["places_at_peak"].items())[:_MOST_PLACES]:
            yield f"  {size / GIB:8,.2f} GiB {place}"


def _listed(title: str, lines: list[str]) -> Iterator[str]:
    """Yield the first lines of a list, or that there are none."""
    yield f"{title}:" if lines else f"{title}: none"
    for line in lines[:_MOST_PLACES]:
        yield f"  {line}"
    if len(lines) > _MOST_PLACES:
        yield f"  and {len(lines) - _MOST_PLACES} more (--json)"
