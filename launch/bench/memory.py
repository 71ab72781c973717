"""``longspan bench memory``: what a step of a Llama's training needs beside its weights, and the longest sequence within a
budget, with each of the memory options, and beside plain PyTorch and ``transformers``.
"""

import json
import statistics
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts
from ..process import process_group, quiet_libraries
from ..table import table
from . import measure
from .measure import Work
from .plain_model import PlainLlama, Size, random_batches, size_of, transformers_llama

OURS = {
    "longspan": {"loss_tile": 1024},
    "longspan, loss not in tiles": {"loss_tile": 1 << 40},
    "longspan, mlp_tile": {"mlp_tile": 1024},
    "longspan, selective recompute": {"recompute": "selective"},
    "longspan, full recompute": {"recompute": "full"},
    "longspan, full recompute, mlp_tile": {"recompute": "full", "mlp_tile": 1024},
    "longspan, full recompute, offload_inputs": {
        "recompute": "full",
        "offload_inputs": True,
    },  # on CUDA
}
THEIRS = ("PyTorch", "transformers", "transformers, gradient checkpointing")
SHORTEST = 1024


@dataclass
class Row:
    """What was found of one candidate."""

    candidate: str
    peaks: dict[int, int] = field(default_factory=dict)
    """By how many bytes the process grows in a step, by the length."""
    longest: int = 0
    """Of the lengths tried, the greatest that stays within the budget."""


def bench_memory(options: Namespace) -> None:
    """Print a table, and write ``memory.json`` and ``memory.png`` to the folder ``options.out``."""
    size, budget = size_of(options), counts(options, "budget_mib")["budget_mib"] * 2**20
    out = measure.out_folder(options)
    ours = [
        name
        for name, memory in OURS.items()
        if measure.device() == "cuda" or "offload_inputs" not in memory
    ]
    rows = [Row(name) for name in (*ours, *THEIRS)]
    with track("lengths", 6 * len(rows), of_bytes=False) as advance:
        for row in rows:
            _search(row, size, budget, advance)
    loss = _loss_times(size)
    print(_table(rows, size, budget, loss))
    record = {
        "machine": measure.machine(),
        "size": asdict(size),
        "budget": budget,
        "loss": loss,
        "rows": [*map(asdict, rows)],
    }
    (out / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
    _draw(rows, out / "memory.png")


def _search(row: Row, size: Size, budget: int, advance: Callable[[int], None]) -> None:
    """Twice the length until it is too much, then between the last two."""
    length = SHORTEST
    while _fits(row, size, length, budget, advance):
        length *= 2
    low, high = length // 2, length
    for _ in range(2):
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(row, size, middle, budget, advance) else (low, middle)


def _fits(row: Row, size: Size, length: int, budget: int, advance: Callable[[int], None]) -> bool:
    peak = measure.fresh_peak(
        __name__, {"candidate": row.candidate, "size": asdict(size), "length": length}, first=256
    )
    if peak is None:
        raise UserError(f"{row.candidate}: a step of {length:,} tokens could not be measured")
    row.peaks[length] = peak
    advance(1)
    if peak <= budget:
        row.longest = max(row.longest, length)
    return peak <= budget


_models: dict[
    str, Callable[[int], Work]
] = {}  # of the process: a model is made once, for the first work


def work_of(given: dict, most: int | None = None) -> Work:
    """In a fresh process: a step of the candidate on one sequence."""
    size, length = Size(**given["size"]), given["length"]
    if not _models:
        make = _ours if given["candidate"] in OURS else _theirs
        _models[given["candidate"]] = make(given["candidate"], size, length)
    return _models[given["candidate"]](min(length, most or length))


def _ours(candidate: str, size: Size, length: int) -> Callable[[int], Work]:
    from ...parallel import Sequence
    from ...trainer.data.batches import Microbatch
    from ...trainer.engines.build import build_engine
    from ...trainer.recipe.check import check_recipe

    quiet_libraries()
    recipe = check_recipe(
        size.recipe(length, 1, {"mixer": "full"}, memory=OURS[candidate]), candidate
    )
    process = ExitStack()
    process.enter_context(process_group(torch.get_num_threads()))
    engine = build_engine(recipe)

    def of(length: int) -> Work:
        tokens = next(random_batches(size, length)).to(engine.device)
        weights = torch.ones(1, length, device=engine.device)
        batch = Microbatch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            weights,
            Sequence.single(1, length, engine.device),
            0,
        )
        return lambda between=None: (
            process,
            engine.step([batch], 1e-4),
        )  # the group lasts as long as the work

    return of


def _theirs(candidate: str, size: Size, length: int) -> Callable[[int], Work]:
    if candidate == "PyTorch":
        model = PlainLlama(size)
        call = model
    else:
        model = transformers_llama(size, length)
        if "checkpointing" in candidate:
            model.gradient_checkpointing_enable()
        model.train()
        call = lambda tokens, labels: (
            model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        )
    device = measure.device()
    model.to(device, getattr(torch, measure.default_dtype()))  # as ours
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def of(length: int) -> Work:
        tokens = next(random_batches(size, length)).to(device)

        def step(between: Callable[[], None] | None = None) -> tuple:
            call(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # gradients are part of what is there before
            return ()

        return step

    return of


def _loss_times(size: Size, tokens: int = 4096, repeats: int = 7) -> dict[str, float]:
    """Seconds of forward and backward of the loss alone, tiled and plain, in turns: medians."""
    import torch.nn.functional as F

    from ...trainer.model.loss import cross_entropy_sum

    generator, device = torch.Generator().manual_seed(0), measure.device()
    hidden = torch.randn(tokens, size.hidden, generator=generator).to(device)
    weight = (torch.randn(size.vocabulary, size.hidden, generator=generator) * 0.1).to(device)
    labels = torch.randint(size.vocabulary, (tokens,), generator=generator).to(device)
    ones, one = torch.ones(tokens, device=device), torch.ones((), device=device)
    works = {
        "tiled": measure.step_of(
            lambda x, w: cross_entropy_sum(x, w, labels, ones), [hidden, weight], one
        ),
        "plain": measure.step_of(
            lambda x, w: F.cross_entropy(x @ w.T, labels, reduction="sum"), [hidden, weight], one
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            seconds[name].append(measure.timed(work)[1])
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _table(rows: list[Row], size: Size, budget: int, loss: dict[str, float]) -> str:
    common = max(set.intersection(*(set(row.peaks) for row in rows)))
    lines = [
        ("candidate", f"MiB at {common:,}", "KiB a token", "and layer", "longest", "x PyTorch")
    ]
    plain = next(row for row in rows if row.candidate == "PyTorch")
    for row in rows:
        (low, least), (high, most) = sorted(row.peaks.items())[0], sorted(row.peaks.items())[-1]
        slope = (most - least) / (high - low) / 2**10
        longest = f"{row.longest:,}" if row.longest else f"< {SHORTEST:,}"
        times = f"{row.longest / plain.longest:.1f}" if plain.longest else "-"
        lines.append(
            (
                row.candidate,
                f"{row.peaks[common] / 2**20:,.0f}",
                f"{slope:,.1f}",
                f"{slope / size.layers:,.1f}",
                longest,
                times,
            )
        )
    shape = f"{size.layers} layers of {size.hidden}, MLPs of {size.intermediate}, vocabulary {size.vocabulary:,}"
    ratio, dtype = loss["tiled"] / loss["plain"], "bf16" if measure.device() == "cuda" else "fp32"
    return "\n".join(
        [
            f"{measure.machine()['device']}, {dtype}; a Llama of {shape}, full attention, one sequence",
            "growth of the memory in use in a step, beside weights, gradients and Adam's moments; "
            f"longest: within {budget >> 20:,} MiB",
            table(lines),
            f"the loss alone, 4,096 tokens: in tiles {1e3 * loss['tiled']:.0f} ms, plain {1e3 * loss['plain']:.0f} ms: "
            f"x {ratio:.2f}",
        ]
    )


def _draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    lines = {
        row.candidate: {length: peak / 2**20 for length, peak in sorted(row.peaks.items())}
        for row in rows
    }
    lengths = sorted(
        {SHORTEST * 2**n for row in rows for n in range(12) if SHORTEST * 2**n in row.peaks}
    )
    measure.plot_against_length(
        axes, lines, lengths, ylabel="MiB beside the model", title="a training step of one sequence"
    )
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=130)
    plt.close(figure)
