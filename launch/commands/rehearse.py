"""``longspan rehearse``: run a recipe's training step on a GPU that is not here."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...trainer.errors import SilentRankError, UserError
from ..options import add_gpus, add_recipe_arguments, device_named, recipe_on_gpus, user_path
from ..table import table

if TYPE_CHECKING:
    from ...trainer.predict.estimate import Device
    from ...trainer.recipe.schema import Recipe

_MOST_PLACES = 8
"""Lines of a list that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the real training step of a recipe, one rank of it, on a GPU and beside ranks that "
        "are not here: its tensors have shapes and no numbers. Shows what would fail, what waits, "
        "which kernels are launched, what ranks send and the memory needed; exit status 1 if "
        "something would fail. Nothing is measured. Needs a C++ compiler once, and no GPU."
    )
    add_recipe_arguments(parser, example="model.num_hidden_layers=4")
    add_gpus(parser)
    parser.add_argument(
        "--rank", type=int, default=0, metavar="R", help="which of the ranks (default 0)"
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=1,
        metavar="N",
        help="equal documents in each sequence (default 1)",
    )
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="also write all that was found, in full"
    )


def run(options: argparse.Namespace) -> int:
    """Print what a rehearsal found; the exit status is 1 if something would fail."""
    device = device_named(options.device)
    recipe = recipe_on_gpus(options.recipe, options.overrides, options.gpus)
    _check(recipe, options)
    found = _rehearse(recipe, device, options.rank, options.documents)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    _print(found, recipe, device, options)
    return 1 if found["faults"] else 0


def _check(recipe: "Recipe", options: argparse.Namespace) -> None:
    ranks = recipe.launch.processes
    if not 0 <= options.rank < ranks:
        raise UserError(f"--rank: must be 0 to {ranks - 1}, got {options.rank}")
    most = recipe.training.seq_length // recipe.model.document_alignment
    if not 1 <= options.documents <= most:
        raise UserError(
            f"--documents: must be 1 to {most}, the aligned documents that fit into "
            f"training.seq_length, got {options.documents}"
        )


def _rehearse(recipe: "Recipe", device: "Device", rank: int, documents: int) -> dict[str, Any]:
    """Return what a process of its own found: torch there believes in the GPU."""
    from ...trainer.recipe.file import to_yaml

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(to_yaml(recipe))
        out = Path(folder, "found.json")
        worker = [sys.executable, "-m", "longspan.launch.workers.rehearse", str(file)]
        arguments = [
            f"--device={device.name}", f"--rank={rank}", f"--documents={documents}", f"--out={out}",
        ]  # fmt: skip
        status = subprocess.run([*worker, *arguments]).returncode
        if status:
            raise SilentRankError(status)
        return json.loads(out.read_text())


def _print(
    found: dict[str, Any], recipe: "Recipe", device: "Device", options: argparse.Namespace
) -> None:
    from ...trainer.predict.estimate import GIB

    parallel = recipe.parallel
    print(
        f"rehearsed rank {options.rank} of {recipe.launch.processes} x {device.name} (dp "
        f"{recipe.data_parallel} x cp {parallel.cp} x pp {parallel.pp} x tp {parallel.tp}); "
        "nothing was computed"
    )
    print(
        f"{found['layers']} layers, {found['microbatches']} microbatches of "
        f"{recipe.training.micro_batch_size} x {recipe.training.seq_length:,} tokens, "
        f"{options.documents:,} documents in each sequence\n"
    )

    _print_list("would fail", found["faults"])
    _print_list("backends", found["backends"])
    for phase, waits in found["waits"].items():
        if phase not in ("build", "start"):
            _print_list(f"the host waits, {phase}", waits)

    print(f"kernels: {found['kernels_per_layer']:,.0f} a layer and microbatch")
    for name, count in found["launches"].items():
        variants = found["variants"][name]
        print(f"  {count:,} {name} (Triton; compiled for {variants} kinds of arguments)")
    for name, count in list(found["top_kernels"].items())[:_MOST_PLACES]:
        print(f"  {count:,} {name}")
    products = ", ".join(f"{n:,.1f} TFLOP in {x}" for x, n in found["product_tflop"].items())
    print(f"torch's matrix products: {products or 'none'}\n")

    if found["collectives"]:
        print("messages of a step")
        rows = [("ranks", "times", "MiB", "beside kernels", "kind", "place")]
        for each in found["collectives"]:
            rows.append(
                (
                    str(each["ranks"]),
                    str(each["count"]),
                    f"{each['bytes'] / 2**20:,.1f}",
                    str(each["hidden"]),
                    each["name"],
                    each["place"].partition(" < ")[0],
                )
            )
        print(table(rows), end="\n\n")

    peak, planned = found["peak_bytes"], found["planned_bytes"]
    print(
        f"memory at the peak: {peak / GIB:,.2f} of {device.memory_gib:g} GiB"
        f"{'' if peak < device.memory_gib * GIB else ': TOO MUCH'}; "
        f"longspan plan says {planned / GIB:,.2f} ({planned / peak - 1:+.1%})"
    )
    for kind, size in found["bytes_at_peak"].items():
        print(f"  {size / GIB:8,.2f} GiB {kind}")
    print("  of these")
    for place, size in list(found["places_at_peak"].items())[:_MOST_PLACES]:
        print(f"  {size / GIB:8,.2f} GiB {place}")


def _print_list(title: str, lines: list[str]) -> None:
    """Print the first lines of a list, or that there are none."""
    print(f"{title}: {'none' if not lines else ''}".rstrip())
    for line in lines[:_MOST_PLACES]:
        print(f"  {line}")
    if len(lines) > _MOST_PLACES:
        print(f"  and {len(lines) - _MOST_PLACES} more (--json)")
    print()
