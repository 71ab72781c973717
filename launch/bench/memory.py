"""``longspan bench memory``: memory of a Llama's training step, and its longest sequence.

Measures what a step needs besides the weights, gradients and moments, with each of the memory
options, and beside plain PyTorch and ``transformers``.
"""

import json
import statistics
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts, out_folder
from ..process import process_group, quiet_libraries
from ..table import table
from . import measure
from .measure import ForwardBackward
from .plain_model import LlamaSize, PlainLlama, random_batches, size_of, transformers_llama

OURS: dict[str, dict[str, Any]] = {
    "longspan": {"loss_tile": 1024},
    "longspan, loss not in tiles": {"loss_tile": 1 << 40},
    "longspan, mlp_tile": {"mlp_tile": 1024},
    "longspan, selective recompute": {"recompute": "selective"},
    "longspan, full recompute": {"recompute": "full"},
    "longspan, full recompute, mlp_tile": {"recompute": "full", "mlp_tile": 1024},
    "longspan, full recompute, offload_inputs": {"recompute": "full", "offload_inputs": True},
}
"""Candidates, and their sections ``memory`` of a recipe; inputs are offloaded on CUDA only."""
OTHERS = ("PyTorch", "transformers", "transformers, gradient checkpointing")
SHORTEST = 1024
"""Tokens of the shortest sequence that is tried."""
WARMUP_TOKENS = 256


@dataclass
class MemoryResult:
    """What was measured of one candidate."""

    candidate: str
    peaks: dict[int, int] = field(default_factory=dict)
    """By how many bytes the process grows in a step, by length."""
    longest: int = 0
    """The greatest of the lengths tried that stays within the budget."""


def bench_memory(options: Namespace) -> None:
    """Print a table, and write ``memory.json`` and ``memory.png`` to the folder ``options.out``."""
    size = size_of(options)
    budget = counts(options, "budget_mib")["budget_mib"] * 2**20
    out = out_folder(options)

    ours = [name for name, memory in OURS.items() if _can_run(memory)]
    results = [MemoryResult(name) for name in (*ours, *OTHERS)]
    with track("lengths", 6 * len(results), of_bytes=False) as advance:
        for result in results:
            _search(result, size, budget, advance)
    loss_seconds = _time_loss(size)

    print(_table(results, size, budget, loss_seconds))
    report = {
        "machine": measure.machine(),
        "size": asdict(size),
        "budget": budget,
        "loss": loss_seconds,
        "rows": [asdict(result) for result in results],
    }
    (out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    _draw(results, out / "memory.png")


def _can_run(memory: dict[str, Any]) -> bool:
    return measure.device() == "cuda" or "offload_inputs" not in memory


def _search(
    result: MemoryResult, size: LlamaSize, budget: int, advance: Callable[[int], None]
) -> None:
    """Double the length until it is too much, then bisect twice between the last two."""
    length = SHORTEST
    while _fits(result, size, length, budget, advance):
        length *= 2

    fitting = length // 2
    too_long = length
    for _ in range(2):
        middle = (fitting + too_long) // 2
        if _fits(result, size, middle, budget, advance):
            fitting = middle
        else:
            too_long = middle


def _fits(
    result: MemoryResult, size: LlamaSize, length: int, budget: int, advance: Callable[[int], None]
) -> bool:
    """Measure a step, record it in ``result``, and return whether it stays within the budget."""
    candidate = {"candidate": result.candidate, "size": asdict(size), "length": length}
    peak = measure.fresh_process_peak("memory", candidate, warmup_tokens=WARMUP_TOKENS)
    if peak is None:
        raise UserError(f"{result.candidate}: a step of {length:,} tokens could not be measured")
    result.peaks[length] = peak
    advance(1)
    if peak > budget:
        return False
    result.longest = max(result.longest, length)
    return True


StepOfLength = Callable[[int], ForwardBackward]
"""A model's training step on one sequence of a number of tokens."""

# Of the process that builds a candidate: the warm-up and the measurement share a model, and its
# process group.
_steps: dict[str, StepOfLength] = {}
_process = ExitStack()


def build_candidate(candidate: dict, max_tokens: int | None) -> ForwardBackward:
    """Build a candidate's training step on one sequence, in the process that measures it."""
    name = candidate["candidate"]
    length = candidate["length"]
    if name not in _steps:
        make = _our_steps if name in OURS else _other_steps
        _steps[name] = make(name, LlamaSize(**candidate["size"]), length)
    return _steps[name](min(length, max_tokens or length))


def _our_steps(candidate: str, size: LlamaSize, longest: int) -> StepOfLength:
    from ...parallel import Sequence
    from ...trainer.data.batches import Microbatch
    from ...trainer.engines.build import build_engine
    from ...trainer.recipe.check import check_recipe

    quiet_libraries()
    recipe = check_recipe(
        size.recipe(longest, 1, {"mixer": "full"}, memory=OURS[candidate]), candidate
    )
    _process.enter_context(process_group(torch.get_num_threads()))
    engine = build_engine(recipe)

    def of_length(length: int) -> ForwardBackward:
        tokens = next(random_batches(size, length)).to(engine.device)
        batch = Microbatch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            torch.ones(1, length, device=engine.device),
            Sequence.single(1, length, engine.device),
            0,
        )

        def step(between: Callable[[], Any] | None = None) -> tuple[Tensor, ...]:
            engine.step([batch], 1e-4)
            return ()

        return step

    return of_length


def _other_steps(candidate: str, size: LlamaSize, longest: int) -> StepOfLength:
    model: torch.nn.Module
    if candidate == "PyTorch":
        model = PlainLlama(size)
    else:
        checkpointing = "checkpointing" in candidate
        model = transformers_llama(size, longest, gradient_checkpointing=checkpointing)
        model.train()
    device = measure.device()
    model.to(device, getattr(torch, measure.default_dtype()))  # as ours
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        if candidate == "PyTorch":
            return model(tokens, labels)
        return model(input_ids=tokens, labels=labels, shift_labels=labels).loss

    def of_length(length: int) -> ForwardBackward:
        tokens = next(random_batches(size, length)).to(device)

        def step(between: Callable[[], Any] | None = None) -> tuple[Tensor, ...]:
            loss_of(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # gradients are part of what is there before
            return ()

        return step

    return of_length


def _time_loss(size: LlamaSize, num_tokens: int = 4096, repeats: int = 7) -> dict[str, float]:
    """Return the median seconds of both passes of the loss alone, tiled and plain."""
    import torch.nn.functional as F

    from ...trainer.model.loss import cross_entropy_sum

    device = measure.device()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, size.hidden, generator=generator).to(device)
    weight = (torch.randn(size.vocabulary, size.hidden, generator=generator) * 0.1).to(device)
    labels = torch.randint(size.vocabulary, (num_tokens,), generator=generator).to(device)
    label_weights = torch.ones(num_tokens, device=device)

    def tiled(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_sum(hidden, weight, labels, label_weights)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    grad_out = torch.ones((), device=device)
    calls = {
        "tiled": measure.forward_backward(tiled, [hidden, weight], grad_out),
        "plain": measure.forward_backward(plain, [hidden, weight], grad_out),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            seconds[name].append(measure.time_once(call)[1])
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _table(
    results: list[MemoryResult], size: LlamaSize, budget: int, loss_seconds: dict[str, float]
) -> str:
    common_length = max(set.intersection(*(set(result.peaks) for result in results)))
    plain = next(result for result in results if result.candidate == "PyTorch")

    rows: list[tuple[str, ...]] = [
        (
            "candidate",
            f"MiB at {common_length:,}",
            "KiB a token",
            "and layer",
            "longest",
            "x PyTorch",
        )
    ]
    for result in results:
        shortest = min(result.peaks)
        longest = max(result.peaks)
        growth = result.peaks[longest] - result.peaks[shortest]
        kib_per_token = growth / (longest - shortest) / 2**10
        rows.append(
            (
                result.candidate,
                f"{result.peaks[common_length] / 2**20:,.0f}",
                f"{kib_per_token:,.1f}",
                f"{kib_per_token / size.layers:,.1f}",
                f"{result.longest:,}" if result.longest else f"< {SHORTEST:,}",
                f"{result.longest / plain.longest:.1f}" if plain.longest else "-",
            )
        )

    dtype = "bf16" if measure.device() == "cuda" else "fp32"
    tiled_ms = 1e3 * loss_seconds["tiled"]
    plain_ms = 1e3 * loss_seconds["plain"]
    return "\n".join(
        [
            f"{measure.machine()['device']}, {dtype}; a Llama of {size.layers} layers of "
            f"{size.hidden}, MLPs of {size.intermediate}, vocabulary {size.vocabulary:,}, "
            "full attention, one sequence",
            "growth of the memory in use in a step, beside weights, gradients and Adam's moments; "
            f"longest: within {budget >> 20:,} MiB",
            table(rows),
            f"the loss alone, 4,096 tokens: in tiles {tiled_ms:.0f} ms, plain {plain_ms:.0f} ms: "
            f"x {loss_seconds['tiled'] / loss_seconds['plain']:.2f}",
        ]
    )


def _draw(results: list[MemoryResult], path: Path) -> None:
    """Draw the growth of each candidate against the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    lines = {
        result.candidate: {length: peak / 2**20 for length, peak in sorted(result.peaks.items())}
        for result in results
    }
    tried = set().union(*(result.peaks for result in results))
    ticks = [SHORTEST * 2**n for n in range(12) if SHORTEST * 2**n in tried]
    measure.plot_against_length(
        axes, lines, ticks, ylabel="MiB beside the model", title="a training step of one sequence"
    )
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=130)
    plt.close(figure)
