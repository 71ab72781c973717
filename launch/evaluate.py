"""``longspan eval``: what a trained run can do, as tables, with the numbers and plots in ``RUN/eval/``."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from ..trainer.data.tokenizer import recipe_tokenizer
from ..trainer.errors import UserError
from ..trainer.evaluation.mqar_settings import settings_of
from ..trainer.progress import track
from ..trainer.run_folder import RunFolder
from .options import numbers
from .process import process_group
from .table import table

if TYPE_CHECKING:
    from ..trainer.data.corpus import Corpus
    from ..trainer.engine import Engine
    from ..trainer.evaluation.held_out import Haystack
    from ..trainer.evaluation.tasks import Example


def eval_mqar(options: Namespace) -> None:
    """Accuracy in the recall task."""
    folder = _folder(options, "mqar")
    lengths = options.lengths and numbers("--lengths", options.lengths)
    pairs = options.pairs and numbers("--pairs", options.pairs)
    settings = settings_of(folder.recipe, lengths, pairs)
    from ..trainer.evaluation.mqar import evaluate_mqar  # bad input is told before torch is imported

    with _engine(folder) as engine:
        report = evaluate_mqar(folder, engine, settings, options.examples, options.seed)
    print(_mqar_table(report))
    print(f"{folder.evaluation('mqar')} has the numbers")


def eval_loss(options: Namespace) -> None:
    """Held-out loss by the place in the context."""
    folder = _folder(options, "loss")
    if options.documents < 1:
        raise UserError(f"--documents: must be at least 1, got {options.documents}")
    lengths = options.lengths and sorted(numbers("--lengths", options.lengths))
    from ..trainer.evaluation.position_loss import default_lengths, position_loss, require_documents

    corpus, trained = _corpus(folder, options), _trained_length(folder)
    lengths = lengths or default_lengths(corpus, trained)
    require_documents(corpus, lengths)
    rows = []
    with _engine(folder) as engine, track("reading", len(lengths) * options.documents, of_bytes=False) as advance:
        for length in lengths:
            read, ranges = position_loss(engine, corpus, length, options.documents, advance)
            rows += [{"length": length, "trained": length <= trained, "documents": read, **r._asdict()} for r in ranges]
    from ..trainer.evaluation.plots import plot_position_loss

    lines = [("documents of", "places", "loss", "gain", "+-", "")]
    for row in rows:
        documents = f"{row['documents']} documents" if row["start"] == 0 else ""
        places = f"{row['start']:,} .. {row['stop']:,}"
        numbers_of = (f"{row[name]:.4f}" for name in ("loss", "gain", "error"))
        lines.append((f"{row['length']:,}", places, *numbers_of, documents))
    print(f"{table(lines)}\ngain: what the same tokens cost more where the model sees none that lie before these places")
    _keep(folder, "loss", {"corpus": corpus.prefix, "ranges": rows}, plot_position_loss, rows)


def eval_needle(options: Namespace) -> None:
    """A number that is hidden in a text, by the text's length and where it is hidden."""
    folder = _folder(options, "needle")
    if options.depths < 2:
        raise UserError(f"--depths: must be at least 2, got {options.depths}")
    depths = [i / (options.depths - 1) for i in range(options.depths)]
    haystack, lengths = _haystack(folder, options)
    from ..trainer.evaluation.retrieval import needles

    settings = [{"length": length, "depth": depth} for length in lengths for depth in depths]
    rows = _ask(folder, options, settings, lambda count, **setting: needles(haystack, count, options.seed, **setting))
    from ..trainer.evaluation.plots import plot_needle

    _keep(folder, "needle", {"examples": options.examples, "seed": options.seed, "settings": rows}, plot_needle, rows)


def eval_tasks(options: Namespace) -> None:
    """Tasks of RULER's kind by the text's length."""
    folder = _folder(options, "tasks")
    from ..trainer.evaluation.tasks import TASKS

    tasks = options.tasks.split(",") if options.tasks else list(TASKS)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: {task} is none; known: {', '.join(TASKS)}")
    haystack, lengths = _haystack(folder, options)
    from ..trainer.evaluation.retrieval import examples

    settings = [{"task": task, "length": length} for task in tasks for length in lengths]
    rows = _ask(folder, options, settings, lambda count, **setting: examples(haystack, count, options.seed, **setting))
    from ..trainer.evaluation.plots import plot_tasks

    _keep(folder, "tasks", {"examples": options.examples, "seed": options.seed, "settings": rows}, plot_tasks, rows)


def _ask(
    folder: RunFolder, options: Namespace, settings: list[dict], examples: Callable[..., Iterator["Example"]]
) -> list[dict]:
    """What the model finds in the examples of each setting, also printed."""
    from ..trainer.evaluation.retrieval import measure

    for setting in settings:
        next(examples(1, **setting))  # tells what does not fit, before the model is loaded
    rows, trained, count = [], _trained_length(folder), options.examples
    with _engine(folder) as engine, track("asking", len(settings) * count, of_bytes=False) as advance:
        for setting in settings:
            found = measure(engine, examples(count, **setting), setting["length"], advance)
            rows.append({**setting, "trained": setting["length"] <= trained, **found._asdict()})
    print(_found_table(rows, list(settings[0]), count))
    return rows


def _folder(options: Namespace, name: str) -> RunFolder:
    """The run, which has weights and takes a report; all that is wrong with options that several commands have."""
    folder = RunFolder(options.run_dir)
    for option in ("examples", "seed"):
        least = 0 if option == "seed" else 1
        if getattr(options, option, least) < least:
            limit = "not be negative" if option == "seed" else "be at least 1"
            raise UserError(f"--{option}: must {limit}, got {getattr(options, option)}")
    if name != "mqar":
        recipe_tokenizer(folder.recipe)  # tells a run without text
    elif folder.recipe.data.mqar is None:
        raise UserError(f"{folder.path}: was not trained on the recall task; its recipe has no data.mqar")
    folder.require_evaluation(name)
    return folder


@contextmanager
def _engine(folder: RunFolder) -> Iterator["Engine"]:
    from ..trainer.generate import load_for_inference

    with process_group(folder.recipe.launch.threads or os.cpu_count() or 1), closing(load_for_inference(folder)) as engine:
        yield engine


def _corpus(folder: RunFolder, options: Namespace) -> "Corpus":
    from ..trainer.evaluation.held_out import held_out_corpus

    return held_out_corpus(folder.recipe, options.data)


def _haystack(folder: RunFolder, options: Namespace) -> tuple["Haystack", list[int]]:
    """Text to hide things in, and how long it is to be."""
    from ..trainer.evaluation.held_out import Haystack

    trained = _trained_length(folder)
    lengths = sorted(numbers("--lengths", options.lengths)) if options.lengths else [trained, 2 * trained, 4 * trained]
    return Haystack(_corpus(folder, options), recipe_tokenizer(folder.recipe)), lengths


def _trained_length(folder: RunFolder) -> int:
    """The longest that the run was trained on."""
    return max(folder.recipe.at(step).training.seq_length for step in folder.recipe.stage_starts)


def _keep(folder: RunFolder, name: str, report: dict, plot, rows: list[dict]) -> None:
    picture = folder.evaluation(name).with_suffix(".png")
    folder.write_evaluation(name, report)
    plot(rows, picture, folder.path.name)
    print(f"{folder.evaluation(name)} has the numbers, {picture.name} beside it shows them")


def _found_table(rows: list[dict], setting: list[str], examples: int) -> str:
    shown = {"length": "{:,}", "depth": "{:.0%}", "task": "{}", "exact": "{:.3f}", "preferred": "{:.3f}", "loss": "{:.3f}"}
    names = [*setting, "exact", "preferred", "loss"]
    lines = [(*names, "")]
    for row in rows:
        lines.append((*(shown[name].format(row[name]) for name in names), "" if row["trained"] else "(longer than trained)"))
    legend = "exact: greedy decoding says it; preferred: to a wrong answer, by chance a half"
    return f"{table(lines)}\n{legend}; {examples} examples of each"


def _mqar_table(report: dict) -> str:
    lines = ["length  pairs  accuracy"]
    for row in report["settings"]:
        note = "" if row["trained"] else "  (not trained)"
        lines.append(f"{row['length']:>6,}  {row['pairs']:>5}  {row['accuracy']:>8.4f}{note}")
    values = round(1 / report["chance"])
    lines.append(f"chance: {report['chance']:.4f}, one of {values} values; {report['examples']} examples of each")
    return "\n".join(lines)
