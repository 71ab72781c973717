"""``longspan plan``: what a recipe will take on a number of GPUs, without one."""

import argparse
from pathlib import Path

from ...trainer.errors import UserError, suggest
from ...trainer.recipe.file import load_recipe
from ...trainer.recipe.schema import Recipe
from ..table import table

_ANY_BATCH = 2**4 * 3**2 * 5 * 7  # sequences: as many microbatches of any likely size


def plan(options: argparse.Namespace) -> None:
    """Print what is predicted, and draw what context-parallel ranks receive against their number."""
    from ...trainer.data.tokenizer import recipe_vocab_size
    from ...trainer.predict.estimate import BANDWIDTH, DEVICES, EFFICIENCY, GIB, PER_NODE, estimate

    if options.device not in DEVICES:
        raise UserError(
            f"--device: unknown{suggest(options.device, list(DEVICES))}; known: {', '.join(DEVICES)}"
        )
    device = DEVICES[options.device]
    recipe = _on(options.recipe, options.overrides, options.gpus)
    parallel, made = recipe.parallel, estimate(recipe, recipe_vocab_size(recipe), device)
    print(f"predicted for {recipe.launch.processes} x {device.name}; nothing here was measured\n")
    arrangement = (
        f"dp {recipe.data_parallel} x cp {parallel.cp} x pp {parallel.pp} x tp {parallel.tp}"
    )
    tokens = f"{recipe.tokens_per_step:,} tokens a step, {recipe.training.seq_length:,} a sequence"
    print(f"parameters   {made.parameters:,}\narrangement  {arrangement}; {tokens}")
    total = sum(made.memory)
    verdict = "" if total < device.memory_gib * GIB else ": TOO MUCH"
    print(
        f"memory       {total / GIB:,.2f} of {device.memory_gib:g} GiB on the GPU that holds most{verdict}\n"
    )
    sizes = [
        (name.replace("_", " "), f"{size / GIB:,.3f} GiB")
        for name, size in made.memory._asdict().items()
    ]
    print(table(sizes), end="\n\n")
    rows = [
        (
            "layers",
            "mixer",
            "MFLOP a token",
            "of its MLP",
            "MiB received",
            "work max/mean",
            "schedule",
        )
    ]
    for kind in made.kinds:
        schedule = kind.choice.schedule if kind.choice else "states" if kind.received else "-"
        numbers = kind.mixer_flops / 1e6, kind.mlp_flops / 1e6, kind.received / 2**20, kind.work
        rows.append(
            (
                f"{kind.layers} x {kind.name}",
                kind.mixer,
                *(f"{number:,.2f}" for number in numbers),
                str(schedule),
            )
        )
    rows.append(("output", "", f"{made.head_flops / 1e6:,.2f}", "", "", "", ""))
    print(table(rows))
    print(
        "of one layer: arithmetic forward; bytes a microbatch brings a rank from others of its sequence, forward and\n"
        "backward; pairs of query and key of the rank with most work, over the mean of all"
    )
    for kind in made.kinds:
        if kind.choice:
            print(kind.choice)
    print(
        f"\nstep         {made.step_s:.3g} s: {made.compute_s:.3g} s of arithmetic, {made.messages_s:.3g} s of messages"
    )
    print(f"speed        {made.tokens_per_second:,.0f} tokens a second")
    print(
        f"assumed      {EFFICIENCY:.0%} of {device.tflops:g} TFLOP/s; {BANDWIDTH:.0%} of {device.link_gb_s:g} GB/s within "
        f"{PER_NODE} GPUs, of {device.network_gb_s:g} GB/s beyond; messages not hidden;\n"
        "             tensor, expert and pipeline parallel messages and bubbles left out"
    )
    if any(block.has_kv_schedule for block in recipe.model.stack):
        print(f"\n{_draw(recipe, Path(options.out))} shows what ranks receive against their number")
    else:
        print("\nno layer has a schedule that could be drawn: only states move")


def _on(name: str, overrides: list[str], gpus: int | None) -> Recipe:
    """The recipe on that many GPUs; its batch is made as large as they need."""
    if gpus is None:
        return load_recipe(name, overrides)
    if gpus < 1:
        raise UserError(f"--gpus: must be at least 1, got {gpus}")
    on_them = [*overrides, f"launch.processes={gpus}"]
    whole = load_recipe(name, [*on_them, f"training.global_batch_size={gpus * _ANY_BATCH}"])
    least = whole.data_parallel * whole.training.micro_batch_size
    asked = load_recipe(
        name, [*overrides, "parallel={}", "launch.processes=1"]
    ).training.global_batch_size
    return load_recipe(name, [*on_them, f"training.global_batch_size={-(-asked // least) * least}"])


def _draw(recipe: Recipe, out: Path) -> Path:
    """For each block with softmax attention a panel, with a line for each schedule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ...parallel import Layout
    from ...parallel.schedules.choose import cost
    from ...parallel.schedules.names import named, unsupported_reason

    model, length = recipe.model, recipe.training.seq_length
    softmax = {name: model.layers.blocks[name] for name in dict.fromkeys(model.stack_names)}
    softmax = {name: block for name, block in softmax.items() if block.has_kv_schedule}
    heads, dims = (
        (model.num_attention_heads, model.kv_heads),
        (model.kv_channels, model.kv_channels),
    )
    figure, panels = plt.subplots(
        1, len(softmax), figsize=(6 * len(softmax), 4.2), layout="constrained", squeeze=False
    )
    for panel, (name, block) in zip(panels[0], softmax.items(), strict=True):
        pattern, lines = block.attention_pattern(model.kv_heads), {}
        for ranks in [2**n for n in range(1, 13) if 2**n * 2 <= length // model.document_alignment]:
            layout = Layout.zigzag(length, ranks, model.document_alignment)
            for way in ("ring", "gather", "stripes", "heads", "grid"):
                if way in ("ring", "grid") and ranks > 512:  # as many stages: a second each
                    continue
                able = [
                    one
                    for one in named(way, ranks)
                    if not unsupported_reason(one, ranks, pattern, *heads)
                ]
                if able:
                    least = min(cost(one, layout, pattern, *heads, dims).received for one in able)
                    lines.setdefault(way, []).append(
                        (ranks, 2 * least * recipe.training.micro_batch_size / 2**20)
                    )
        for way, points in lines.items():
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=way)
        panel.set(xlabel="context-parallel ranks", title=f"{name}: {pattern!r}")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:,g}")
        panel.set_ylabel("MiB received, forward and backward\n(predicted; the rank with most)")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return out
