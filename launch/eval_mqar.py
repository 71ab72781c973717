"""``longspan eval mqar RUN``: the accuracy of a trained run in the recall task, at its own and at longer lengths."""

import os
from argparse import Namespace

from ..trainer.errors import UserError
from ..trainer.mqar_settings import settings_of
from ..trainer.run_folder import RunFolder
from .options import numbers
from .process import process_group


def eval_mqar(options: Namespace) -> None:
    """Print a table, and write ``RUN/eval/mqar.json``."""
    folder = RunFolder(options.run_dir)
    if folder.recipe.data.mqar is None:
        raise UserError(f"{folder.path}: was not trained on the recall task; its recipe has no data.mqar")
    if options.examples < 1:
        raise UserError(f"--examples: must be at least 1, got {options.examples}")
    if options.seed < 0:
        raise UserError(f"--seed: must not be negative, got {options.seed}")
    lengths = options.lengths and numbers("--lengths", options.lengths)
    pairs = options.pairs and numbers("--pairs", options.pairs)
    settings = settings_of(folder.recipe, lengths, pairs)
    if not os.access(folder.mqar if folder.mqar.exists() else folder.path, os.W_OK):
        raise UserError(f"{folder.mqar}: cannot be written")
    from ..trainer.generate import load_for_inference  # bad input is told before torch is imported
    from ..trainer.mqar_accuracy import evaluate_mqar

    with process_group(folder.recipe.launch.threads or os.cpu_count() or 1):
        engine = load_for_inference(folder)
        report = evaluate_mqar(folder, engine, settings, options.examples, options.seed)
    print(_table(report))
    print(f"{folder.mqar} has the numbers")


def _table(report: dict) -> str:
    lines = ["length  pairs  accuracy"]
    for row in report["settings"]:
        note = "" if row["trained"] else "  (not trained)"
        lines.append(f"{row['length']:>6,}  {row['pairs']:>5}  {row['accuracy']:>8.4f}{note}")
    values = round(1 / report["chance"])
    lines.append(f"chance: {report['chance']:.4f}, one of {values} values; {report['examples']} examples of each")
    return "\n".join(lines)
