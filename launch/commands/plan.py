"""``longspan plan``: predict what a recipe takes on a number of GPUs, without one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import (
    add_gpus,
    add_recipe_arguments,
    device_named,
    recipe_on_gpus,
    user_path,
)
from ..table import table

if TYPE_CHECKING:
    from ...trainer.layers.base import Block
    from ...trainer.predict.estimate import Device, Estimate
    from ...trainer.recipe.schema import Recipe

_MOST_STAGES = 1000
"""Schedules of more stages are not drawn: planning them takes seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predict what a recipe needs on a number of GPUs: memory, arithmetic, messages and time. "
        "Needs no GPU itself."
    )
    add_recipe_arguments(parser, example="parallel.cp=8")
    add_gpus(parser)
    parser.add_argument(
        "-o",
        "--out",
        type=user_path,
        default="plan.png",
        metavar="PNG",
        help="plot of bytes received against ranks (default %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Print what is predicted, and draw what ranks receive against their number."""
    from ...trainer.data.tokenizer import recipe_vocab_size
    from ...trainer.predict.estimate import estimate

    device = device_named(options.device)
    recipe = recipe_on_gpus(options.recipe, options.overrides, options.gpus)
    predicted = estimate(recipe, recipe_vocab_size(recipe), device)

    print(f"predicted for {recipe.launch.processes} x {device.name}; nothing here was measured\n")
    _print_sizes(recipe, predicted, device)
    _print_layers(predicted)
    _print_backends(recipe, device)
    _print_speed(predicted, device)

    blocks = {name: recipe.model.layers.blocks[name] for name in recipe.model.stack_names}
    softmax = {name: block for name, block in blocks.items() if block.has_kv_schedule}
    if softmax:
        picture = Path(options.out)
        _draw(recipe, softmax, picture)
        print(f"\n{picture} shows what ranks receive against their number")
    else:
        print("\nno layer has a schedule to draw: only states move")


def _print_sizes(recipe: "Recipe", predicted: "Estimate", device: "Device") -> None:
    from ...trainer.predict.estimate import GIB

    parallel = recipe.parallel
    print(f"parameters   {predicted.parameters:,}")
    print(
        f"arrangement  dp {recipe.data_parallel} x cp {parallel.cp} x pp {parallel.pp} "
        f"x tp {parallel.tp}; {recipe.tokens_per_step:,} tokens a step, "
        f"{recipe.training.seq_length:,} a sequence"
    )

    total = sum(predicted.memory)
    verdict = "" if total < device.memory_gib * GIB else ": TOO MUCH"
    print(
        f"memory       {total / GIB:,.2f} of {device.memory_gib:g} GiB on the GPU that holds most"
        f"{verdict}\n"
    )
    sizes = [
        (name.replace("_", " "), f"{size / GIB:,.3f} GiB")
        for name, size in predicted.memory._asdict().items()
    ]
    print(table(sizes), end="\n\n")


def _print_layers(predicted: "Estimate") -> None:
    header = (
        "layers",
        "mixer",
        "MFLOP a token",
        "of its MLP",
        "MiB received",
        "work max/mean",
        "schedule",
    )
    rows = [header]
    for kind in predicted.kinds:
        schedule = "states" if kind.received else "-"
        if kind.choice:
            schedule = str(kind.choice.schedule)
        rows.append(
            (
                f"{kind.layers} x {kind.name}",
                kind.mixer,
                f"{kind.mixer_flops / 1e6:,.2f}",
                f"{kind.mlp_flops / 1e6:,.2f}",
                f"{kind.received / 2**20:,.2f}",
                f"{kind.work:,.2f}",
                schedule,
            )
        )
    rows.append(("output", "", f"{predicted.head_flops / 1e6:,.2f}", "", "", "", ""))
    print(table(rows))
    print(
        "for one layer: forward arithmetic; bytes that a rank receives from the others of its "
        "sequence in a microbatch's\n"
        "forward and backward; pairs of query and key on the rank with most, over the mean of all"
    )
    for kind in predicted.kinds:
        if kind.choice:
            print(kind.choice)


def _print_backends(recipe: "Recipe", device: "Device") -> None:
    from ...trainer.predict.backends import backend_lines

    print()
    for line in backend_lines(recipe, device.capability):
        print(line)


def _print_speed(predicted: "Estimate", device: "Device") -> None:
    from ...trainer.predict.estimate import BANDWIDTH, EFFICIENCY, PER_NODE

    print(
        f"\nstep         {predicted.step_s:.3g} s: {predicted.compute_s:.3g} s of arithmetic, "
        f"{predicted.messages_s:.3g} s of messages"
    )
    print(f"speed        {predicted.tokens_per_second:,.0f} tokens a second")
    print(
        f"assumed      {EFFICIENCY:.0%} of {device.tflops:g} TFLOP/s; "
        f"{BANDWIDTH:.0%} of {device.link_gb_s:g} GB/s within {PER_NODE} GPUs, "
        f"of {device.network_gb_s:g} GB/s beyond; messages not hidden;\n"
        "             tensor, expert and pipeline parallel messages and bubbles left out"
    )


def _draw(recipe: "Recipe", blocks: dict[str, "Block"], path: Path) -> None:
    """Draw a panel for each block of softmax attention, with a line for each KV schedule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(blocks), figsize=(6 * len(blocks), 4.2), layout="constrained", squeeze=False
    )
    for axes, (name, block) in zip(panels[0], blocks.items(), strict=True):
        for schedule, mebibytes in _received(recipe, block).items():
            axes.plot(
                mebibytes.keys(), mebibytes.values(), marker="o", markersize=3, label=schedule
            )
        pattern = block.attention_pattern(recipe.model.kv_heads)
        axes.set(xlabel="context-parallel ranks", title=f"{name}: {pattern!r}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
        axes.set_ylabel("MiB received, forward and backward\n(predicted; the rank with most)")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _received(recipe: "Recipe", block: "Block") -> dict[str, dict[int, float]]:
    """Return the MiB that the rank with most receives, by KV schedule and number of ranks.

    A schedule that cannot compute the block over a number of ranks has no value there.
    """
    from ...parallel import Layout
    from ...parallel.schedules.choose import cost
    from ...parallel.schedules.names import KV_SCHEDULES, schedules_named

    model = recipe.model
    length = recipe.training.seq_length
    heads = (model.num_attention_heads, model.kv_heads)
    head_dims = (model.kv_channels, model.kv_channels)
    pattern = block.attention_pattern(model.kv_heads)

    received: dict[str, dict[int, float]] = {}
    for exponent in range(1, 13):
        ranks = 2**exponent
        if 2 * ranks > length // model.document_alignment:
            break
        layout = Layout.zigzag(length, ranks, model.document_alignment)
        for name in (*KV_SCHEDULES, "heads", "grid"):
            schedules = schedules_named(name, ranks)
            if sum(schedule.num_stages(ranks) for schedule in schedules) > _MOST_STAGES:
                continue
            supported = [
                schedule
                for schedule in schedules
                if not schedule.unsupported_reason(ranks, pattern, *heads)
            ]
            if supported:
                forward = min(
                    cost(schedule, layout, pattern, *heads, head_dims).received
                    for schedule in supported
                )
                both = 2 * forward * recipe.training.micro_batch_size
                received.setdefault(name, {})[ranks] = both / 2**20
    return received
