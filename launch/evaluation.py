"""What the ``longspan eval`` commands share.

Each measures what a trained run can do, prints a table, and keeps the numbers and a plot in
``RUN/eval/``.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..trainer.checkpoint.run_folder import RunFolder
from ..trainer.data.tokenizer import recipe_tokenizer
from ..trainer.errors import UserError
from ..trainer.progress import track
from .options import counts, numbers
from .process import process_group
from .table import table

if TYPE_CHECKING:  # these import torch, which bad input must not wait for
    from ..trainer.data.corpus import Corpus
    from ..trainer.engines.engine import Engine
    from ..trainer.evaluation.examples import Example
    from ..trainer.evaluation.held_out import Haystack

_NAME_TOKENS = 32
"""Tokens by which two examples of a length may differ, since names are split in several ways."""

Plot = Callable[[Path, str], None]
"""``plot(path, title)`` draws an evaluation to a file."""


def open_run(options: Namespace, name: str) -> RunFolder:
    """Open the run of an ``eval`` command, and check all that these commands have in common.

    Args:
        options: of the command.
        name: the evaluation: ``mqar``, ``loss``, ``needle`` or ``tasks``.

    Raises:
        UserError: if an option, or the run, does not fit the evaluation, or its report cannot be
            written.
    """
    folder = RunFolder(options.run_dir)
    counts(options, *(option for option in ("examples", "documents") if option in options))
    if "seed" in options and options.seed < 0:
        raise UserError(f"--seed: must not be negative, got {options.seed}")

    if name != "mqar":
        recipe_tokenizer(folder.recipe)  # raises for a run that was not trained on text
    elif folder.recipe.data.mqar is None:
        raise UserError(
            f"{folder.path}: was not trained on the recall task; its recipe has no data.mqar"
        )
    folder.require_evaluation(name)
    return folder


@contextmanager
def inference_engine(folder: RunFolder) -> Iterator["Engine"]:
    """The run's model in a process group of this process alone, or in torchrun's."""
    from ..trainer.engines.inference import load_for_inference

    threads = folder.recipe.launch.threads or os.cpu_count() or 1
    with process_group(threads), closing(load_for_inference(folder)) as engine:
        yield engine


def open_corpus(folder: RunFolder, prefix: str | None) -> "Corpus":
    """Open the corpus ``prefix``, by default the run's held-out text; the run must have weights."""
    from ..trainer.evaluation.held_out import held_out_corpus

    folder.require_weights()
    return held_out_corpus(folder.weights_recipe(), prefix)


def open_haystack(folder: RunFolder, options: Namespace) -> tuple["Haystack", list[int]]:
    """Return the text to hide things in, and the lengths of the examples in tokens."""
    from ..trainer.evaluation.held_out import Haystack

    if options.lengths:
        lengths = sorted(numbers("--lengths", options.lengths))
    else:
        trained = trained_length(folder)
        lengths = [trained, 2 * trained, 4 * trained]
    return Haystack(open_corpus(folder, options.data), recipe_tokenizer(folder.recipe)), lengths


def trained_length(folder: RunFolder) -> int:
    """Return the longest sequence that the weights were trained on, in tokens."""
    recipe = folder.recipe
    steps = folder.weights_step() or recipe.training.steps
    return max(
        recipe.at_step(start).training.seq_length
        for start in recipe.stage_starts
        if start < max(1, steps)
    )


def ask_questions(
    folder: RunFolder,
    options: Namespace,
    settings: list[dict],
    examples: Callable[..., Iterator["Example"]],
) -> list[dict]:
    """Ask the model the examples of each setting; print a table of its answers, and return them.

    Args:
        folder: the run.
        options: of the command. Without ``--lengths``, settings that are too short are left out.
        settings: each with a ``length`` in tokens, and what else ``examples`` needs.
        examples: ``examples(count, **setting)`` makes the examples of a setting.
    """
    from ..trainer.evaluation.scoring import score_examples

    settings = _fitting(settings, examples, must_fit=bool(options.lengths))
    trained = trained_length(folder)

    answers = []
    with (
        inference_engine(folder) as engine,
        track("asking", len(settings) * options.examples, of_bytes=False) as advance,
    ):
        for setting in settings:
            length = setting["length"]
            result = score_examples(engine, examples(options.examples, **setting), length, advance)
            answers.append({**setting, "trained": length <= trained, **result._asdict()})

    print(_answers_table(answers, list(settings[0]), options.examples))
    return answers


def _fitting(
    settings: list[dict], examples: Callable[..., Iterator["Example"]], must_fit: bool
) -> list[dict]:
    """Return the settings whose length has room for a question; found out before a model is loaded.

    Raises:
        UserError: if none has, or, with ``must_fit``, if one has not.
    """
    fitting = []
    for setting in settings:
        try:
            next(examples(1, **{**setting, "length": setting["length"] - _NAME_TOKENS}))
        except UserError:
            if must_fit:
                raise
        else:
            fitting.append(setting)
    if not fitting:
        raise UserError(
            "--lengths: the trained length is too short for any question; give longer ones"
        )
    return fitting


def _answers_table(answers: list[dict], setting_names: list[str], examples: int) -> str:
    formats = {"length": "{:,}", "depth": "{:.0%}", "task": "{}"}
    result_names = ["exact", "exact_error", "preferred", "preferred_error", "loss"]
    headers = ["+-" if name.endswith("error") else name for name in result_names]

    lines = [(*setting_names, *headers, "")]
    for answer in answers:
        cells = [
            formats.get(name, "{:.3f}").format(answer[name])
            for name in (*setting_names, *result_names)
        ]
        lines.append((*cells, "" if answer["trained"] else "(longer than trained)"))

    legend = (
        "exact: greedy decoding gives the answer; preferred: to a wrong answer that is in the text "
        f"too (chance: a half); {examples} examples of each"
    )
    return f"{table(lines)}\n{legend}"


def save_answers(
    folder: RunFolder,
    name: str,
    options: Namespace,
    answers: list[dict],
    plot: Callable[[list[dict], Path, str], None],
) -> None:
    """Keep the answers of :func:`ask_questions` and their plot."""
    report = {"examples": options.examples, "seed": options.seed, "settings": answers}
    save_evaluation(folder, name, report, lambda path, title: plot(answers, path, title))


def save_evaluation(folder: RunFolder, name: str, report: dict, plot: Plot) -> None:
    """Keep a report as JSON, and its plot beside it."""
    folder.write_evaluation(name, report)
    draw_plot(folder, name, plot)


def draw_plot(folder: RunFolder, name: str, plot: Plot) -> None:
    """Draw the plot of an evaluation beside its report, and print where both are."""
    report = folder.evaluation(name)
    picture = report.with_suffix(".png")
    plot(picture, folder.path.name)
    print(f"{report} has the numbers, {picture.name} beside it shows them")
