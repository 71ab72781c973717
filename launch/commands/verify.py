"""``longspan verify``: check a recipe's layers over context-parallel ranks against one rank."""

import argparse
import math
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
        "On the CPU, in a small model with the recipe's layers and patterns: replace tokens, see "
        "which positions change, and compare loss and gradients over context-parallel ranks with "
        "those on one rank."
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
    """Refuse schedules that cannot do it before any process starts."""
    from ...trainer.recipe.kv_schedules import schedule_problems

    parallel = recipe.parallel.model_copy(update={"cp": cp, "tp": 1})
    if problems := [
        f"{options.recipe}: {key}: {reason}"
        for key, reason in schedule_problems(recipe.model, parallel)
    ]:
        raise UserError("\n".join(problems))


def _report(recipe: "Recipe", cp: int, files: dict[int, Path]) -> int:
    import torch

    from ...trainer.evaluation.parity import (
        GRADIENT,
        LOSS,
        STACK,
        cases,
        documents_of,
        find_leak,
        shrink,
    )
    from ...trainer.predict.communication import choices

    shrunk = shrink(recipe, cp)
    alone, several = (torch.load(files[ranks], weights_only=False) for ranks in (1, cp))
    documents, schedules = (
        documents_of(shrunk),
        {choice.block: str(choice.schedule) for choice in choices(shrunk, 4)},
    )
    rows, wrong = [("layers", "mixer", "schedule", "probes", "loss", "worst gradient", "")], []
    for name, case in cases(shrunk):
        one, many = alone[name], several[name]
        reason = find_leak(case, documents, many.changed) or find_leak(case, documents, one.changed)
        loss = abs(many.loss - one.loss) / abs(one.loss)
        gradients = {
            key: _distance(many.gradients[key], value) for key, value in one.gradients.items()
        }
        worst = max(gradients, key=lambda key: (math.isnan(gradients[key]), gradients[key]))
        good = not reason and loss <= LOSS and gradients[worst] <= GRADIENT
        if not good:
            far = f"loss or gradients are further than {LOSS:g} and {GRADIENT:g} from one rank"
            wrong.append(f"{name}: {reason or far}")
        mixer = "" if name == STACK else case.model.stack[0].kind()
        rows.append(
            (
                name,
                mixer,
                schedules.get(name, ""),
                "exact" if not reason else "WRONG",
                f"{loss:.1e}",
                f"{gradients[worst]:.1e} {worst}",
                "ok" if good else "WRONG",
            )
        )
    tokens, ends = shrunk.training.seq_length, int(documents.max()) + 1
    print(
        f"{cp} context-parallel ranks ({shrunk.parallel.layout}) against one: "
        f"{tokens:,} tokens in {ends} documents,"
    )
    print(
        f"{len(next(iter(several.values())).changed)} tokens replaced in turn; "
        "differences are relative\n"
    )
    print(table(rows))
    for line in wrong:
        print(f"longspan: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _distance(ours, expected) -> float:
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30))
