"""``longspan verify``: check a recipe's layers over context-parallel ranks against one rank."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ...trainer.errors import UserError
from ..options import add_recipe_arguments
from ..ranks import run_ranks
from ..table import table

if TYPE_CHECKING:
    from ...trainer.recipe.schema import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "On the CPU, in a small model with the recipe's layers and patterns: replace tokens, one "
        "and many at a time and by NaN, see which positions change, and compare loss and gradients "
        "over context-parallel ranks with those on one rank."
    )
    add_recipe_arguments(parser, example="parallel.schedule=ring")
    parser.add_argument(
        "--cp", type=int, metavar="N", help="ranks (default: those of the recipe, at least 2)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table; the exit status is 0 if all layers do what they do on one rank, else 1."""
    from ...trainer.recipe.file import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    cp = max(2, recipe.parallel.cp) if options.cp is None else options.cp
    if cp < 2:
        raise UserError(
            f"--cp: must be at least 2, got {cp}: there is nothing to compare with one rank"
        )
    _check(recipe, options, cp)
    with tempfile.TemporaryDirectory() as folder:
        files = {ranks: Path(folder, f"{ranks}.pt") for ranks in (1, cp)}
        for ranks, file in files.items():
            worker = [sys.executable, "-u", "-m", "longspan.launch.workers.verify"]
            arguments = [f"--cp={cp}", f"--out={file}", "--", options.recipe, *options.overrides]
            if status := run_ranks([*worker, *arguments], ranks, threads=1):
                return status
        return _report(recipe, cp, files)


def _check(recipe: "Recipe", options: argparse.Namespace, cp: int) -> None:
    """Refuse KV schedules that cannot do the layers, before any process starts."""
    from ...trainer.recipe.kv_schedules import schedule_problems

    parallel = recipe.parallel.model_copy(update={"cp": cp, "tp": 1})
    problems = [
        f"{options.recipe}: {key}: {reason}"
        for key, reason in schedule_problems(recipe.model, parallel)
    ]
    if problems:
        raise UserError("\n".join(problems))


def _report(recipe: "Recipe", cp: int, files: dict[int, Path]) -> int:
    import torch

    from ...trainer.evaluation.parity import STACK, cases, compare, documents_of, shrink
    from ...trainer.predict.communication import choices

    shrunk = shrink(recipe, cp)
    documents = documents_of(shrunk)
    schedule_of = {choice.block: str(choice.schedule) for choice in choices(shrunk, 4)}
    on_one = torch.load(files[1], weights_only=False)
    on_ranks = torch.load(files[cp], weights_only=False)

    rows = [("layers", "mixer", "schedule", "probes", "loss", "worst gradient", "")]
    problems = []
    for name, case in cases(shrunk):
        result = compare(case, documents, on_one[name], on_ranks[name])
        if result.problem:
            problems.append(f"{name}: {result.problem}")
        rows.append(
            (
                name,
                "" if name == STACK else case.model.stack[0].kind(),
                schedule_of.get(name, ""),
                "WRONG" if result.leak else "exact",
                f"{result.loss_error:.1e}",
                f"{result.gradient_error:.1e} {result.worst_gradient}",
                "WRONG" if result.problem else "ok",
            )
        )

    num_documents = int(documents.max()) + 1
    num_probes = len(next(iter(on_ranks.values())).changed)
    print(
        f"{cp} context-parallel ranks ({shrunk.parallel.layout}) against one: "
        f"{shrunk.training.seq_length:,} tokens in {num_documents} documents,"
    )
    print(f"{num_probes} tokens replaced in turn, and many at a time; differences are relative\n")
    print(table(rows))
    for problem in problems:
        print(f"longspan: {problem}", file=sys.stderr)
    return 1 if problems else 0
