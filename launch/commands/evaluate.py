"""``longspan eval``: what a trained run can do, as tables, with the numbers and plots in ``RUN/eval/``."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...trainer.checkpoint.run_folder import RunFolder
from ...trainer.data.tokenizer import recipe_tokenizer
from ...trainer.errors import UserError
from ...trainer.evaluation.mqar_settings import settings_of
from ...trainer.progress import track
from ..options import counts, numbers
from ..process import process_group
from ..table import table

if TYPE_CHECKING:
    from ...trainer.data.corpus import Corpus
    from ...trainer.engines.engine import Engine
    from ...trainer.evaluation.held_out import Haystack
    from ...trainer.evaluation.tasks import Example

_NAMES = 32
"""Tokens by which two examples of a length may differ, since names are split in several ways."""


def eval_mqar(options: Namespace) -> None:
    """Accuracy in the recall task."""
    folder = _folder(options, "mqar")
    lengths = options.lengths and numbers("--lengths", options.lengths)
    pairs = options.pairs and numbers("--pairs", options.pairs)
    settings = settings_of(folder.recipe, lengths, pairs)
    from ...trainer.evaluation.mqar import (
        evaluate_mqar,
    )  # bad input is told before torch is imported

    with _engine(folder) as engine:
        report = evaluate_mqar(folder, engine, settings, options.examples, options.seed)
    from ...trainer.evaluation.plots import plot_mqar

    print(_mqar_table(report))
    _show(folder, "mqar", lambda *where: plot_mqar(report, *where))


def eval_loss(options: Namespace) -> None:
    """Held-out loss by the place in the context."""
    folder = _folder(options, "loss")
    asked = sorted(numbers("--lengths", options.lengths)) if options.lengths else None
    from ...trainer.evaluation.position_loss import documents_of, lengths_of, position_loss

    corpus, trained = _corpus(folder, options), _trained_length(folder)
    documents = {
        length: documents_of(corpus, length, options.documents)
        for length in lengths_of(corpus, asked, trained)
    }
    rows = []
    with (
        _engine(folder) as engine,
        track("reading", sum(map(len, documents.values())), of_bytes=False) as advance,
    ):
        for length, chosen in documents.items():
            for found in position_loss(engine, corpus, length, chosen, advance):
                seen = {
                    "length": length,
                    "documents": len(chosen),
                    "trained": found.stop <= trained,
                }
                rows.append({**seen, **found._asdict()})
    from ...trainer.evaluation.plots import plot_position_loss

    lines = [("documents of", "places", "loss", "gain", "+-", "")]
    for row in rows:
        notes = [f"{row['documents']} documents"] * (row["start"] == 0) + [
            "(longer than trained)"
        ] * (not row["trained"])
        numbers_of = (
            "-" if row[name] is None else f"{row[name]:.4f}" for name in ("loss", "gain", "error")
        )
        lines.append(
            (
                f"{row['length']:,}",
                f"{row['start']:,} .. {row['stop']:,}",
                *numbers_of,
                " ".join(notes),
            )
        )
    print(
        f"{table(lines)}\ngain: what the same tokens cost more where the text begins at half the first of these places"
    )
    report = {"corpus": corpus.prefix, "trained_length": trained, "ranges": rows}
    _keep(folder, "loss", report, lambda *where: plot_position_loss(rows, trained, *where))


def eval_needle(options: Namespace) -> None:
    """A number that is hidden in a text, by the text's length and where it is hidden."""
    folder = _folder(options, "needle")
    if options.depths < 2:
        raise UserError(f"--depths: must be at least 2, got {options.depths}")
    depths = [i / (options.depths - 1) for i in range(options.depths)]
    haystack, lengths = _haystack(folder, options)
    from ...trainer.evaluation.plots import plot_needle
    from ...trainer.evaluation.retrieval import needles

    settings = [{"length": length, "depth": depth} for length in lengths for depth in depths]
    rows = _ask(
        folder,
        options,
        settings,
        lambda count, **setting: needles(haystack, count, options.seed, **setting),
    )
    _keep_found(folder, "needle", options, rows, plot_needle)


def eval_tasks(options: Namespace) -> None:
    """Tasks of RULER's kind by the text's length."""
    folder = _folder(options, "tasks")
    from ...trainer.evaluation.tasks import TASKS

    tasks = options.tasks.split(",") if options.tasks else list(TASKS)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: {task} is none; known: {', '.join(TASKS)}")
    haystack, lengths = _haystack(folder, options)
    from ...trainer.evaluation.plots import plot_tasks
    from ...trainer.evaluation.retrieval import examples

    settings = [{"task": task, "length": length} for task in tasks for length in lengths]
    rows = _ask(
        folder,
        options,
        settings,
        lambda count, **setting: examples(haystack, count, options.seed, **setting),
    )
    _keep_found(folder, "tasks", options, rows, plot_tasks)


def _ask(
    folder: RunFolder,
    options: Namespace,
    settings: list[dict],
    examples: Callable[..., Iterator["Example"]],
) -> list[dict]:
    """What the model finds in the examples of each setting, also printed."""
    from ...trainer.evaluation.retrieval import measure

    fitting = []
    for setting in settings:  # before the model is loaded
        try:
            next(examples(1, **{**setting, "length": setting["length"] - _NAMES}))
        except UserError:
            if options.lengths:
                raise
        else:
            fitting.append(setting)
    if not fitting:
        raise UserError(
            "--lengths: the trained length is too short for any question; give longer ones"
        )
    settings, rows, trained, count = fitting, [], _trained_length(folder), options.examples
    with (
        _engine(folder) as engine,
        track("asking", len(settings) * count, of_bytes=False) as advance,
    ):
        for setting in settings:
            found = measure(engine, examples(count, **setting), setting["length"], advance)
            rows.append({**setting, "trained": setting["length"] <= trained, **found._asdict()})
    print(_found_table(rows, list(settings[0]), count))
    return rows


def _folder(options: Namespace, name: str) -> RunFolder:
    """The run, which takes a report; all that is wrong with options that several commands have."""
    folder = RunFolder(options.run_dir)
    counts(options, *(name for name in ("examples", "documents") if name in options))
    if "seed" in options and options.seed < 0:
        raise UserError(f"--seed: must not be negative, got {options.seed}")
    if name != "mqar":
        recipe_tokenizer(folder.recipe)  # tells a run without text
    elif folder.recipe.data.mqar is None:
        raise UserError(
            f"{folder.path}: was not trained on the recall task; its recipe has no data.mqar"
        )
    if name in ("needle", "tasks"):
        for block in folder.recipe.model.stack:
            if block.queries_choose_together:
                raise UserError(
                    f"{folder.path}: has {block.kind()} layers, whose blocks of queries choose together: an answer would be seen before "
                    "it is given; only eval loss can be asked"
                )
    folder.require_evaluation(name)
    return folder


@contextmanager
def _engine(folder: RunFolder) -> Iterator["Engine"]:
    from ...trainer.engines.inference import load_for_inference

    with (
        process_group(folder.recipe.launch.threads or os.cpu_count() or 1),
        closing(load_for_inference(folder)) as engine,
    ):
        yield engine


def _corpus(folder: RunFolder, options: Namespace) -> "Corpus":
    from ...trainer.evaluation.held_out import held_out_corpus

    folder.require_weights()
    return held_out_corpus(folder.weights_recipe(), options.data)


def _haystack(folder: RunFolder, options: Namespace) -> tuple["Haystack", list[int]]:
    """Text to hide things in, and how long it is to be."""
    from ...trainer.evaluation.held_out import Haystack

    trained = _trained_length(folder)
    lengths = (
        sorted(numbers("--lengths", options.lengths))
        if options.lengths
        else [trained, 2 * trained, 4 * trained]
    )
    return Haystack(_corpus(folder, options), recipe_tokenizer(folder.recipe)), lengths


def _trained_length(folder: RunFolder) -> int:
    """The longest that the weights were trained on."""
    recipe, steps = folder.recipe, folder.weights_step() or folder.recipe.training.steps
    return max(
        recipe.at(start).training.seq_length
        for start in recipe.stage_starts
        if start < max(1, steps)
    )


def _keep_found(
    folder: RunFolder, name: str, options: Namespace, rows: list[dict], plot: Callable[..., None]
) -> None:
    report = {"examples": options.examples, "seed": options.seed, "settings": rows}
    _keep(folder, name, report, lambda *where: plot(rows, *where))


def _keep(folder: RunFolder, name: str, report: dict, plot: Callable[[Path, str], None]) -> None:
    folder.write_evaluation(name, report)
    _show(folder, name, plot)


def _show(folder: RunFolder, name: str, plot: Callable[[Path, str], None]) -> None:
    picture = folder.evaluation(name).with_suffix(".png")
    plot(picture, folder.path.name)
    print(f"{folder.evaluation(name)} has the numbers, {picture.name} beside it shows them")


def _found_table(rows: list[dict], setting: list[str], examples: int) -> str:
    shown = {"length": "{:,}", "depth": "{:.0%}", "task": "{}"}
    found = ["exact", "exact_error", "preferred", "preferred_error", "loss"]
    lines = [(*setting, *("+-" if name.endswith("error") else name for name in found), "")]
    for row in rows:
        cells = [shown.get(name, "{:.3f}").format(row[name]) for name in (*setting, *found)]
        lines.append((*cells, "" if row["trained"] else "(longer than trained)"))
    legend = "exact: greedy decoding says it; preferred: to a wrong answer that is in the text too, by chance a half"
    return f"{table(lines)}\n{legend}; {examples} examples of each"


def _mqar_table(report: dict) -> str:
    lines = ["length  pairs  accuracy"]
    for row in report["settings"]:
        note = "" if row["trained"] else "  (not trained)"
        lines.append(f"{row['length']:>6,}  {row['pairs']:>5}  {row['accuracy']:>8.4f}{note}")
    values = round(1 / report["chance"])
    lines.append(
        f"chance: {report['chance']:.4f}, one of {values} values; {report['examples']} examples of each"
    )
    return "\n".join(lines)
