"""``longspan eval tasks``: tasks in the manner of RULER, by the text's length."""

import argparse

from ...trainer.errors import UserError
from ..options import add_evaluated_text, add_examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a run on tasks in the style of RULER: find several numbers in held-out text, one "
        "among many, one that is passed on from name to name; find the most frequent word."
    )
    add_evaluated_text(parser)
    add_examples(parser, default=50)
    parser.add_argument(
        "--tasks", metavar="NAME,NAME", help="several, crowd, chain, frequent (default: all)"
    )


def run(options: argparse.Namespace) -> None:
    from ..evaluation import ask_questions, open_haystack, open_run, save_answers

    folder = open_run(options, "tasks")

    from ...trainer.evaluation.tasks import TASKS

    tasks = options.tasks.split(",") if options.tasks else list(TASKS)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: {task} is not a task; known: {', '.join(TASKS)}")
    haystack, lengths = open_haystack(folder, options)

    from ...trainer.evaluation.plots import plot_tasks
    from ...trainer.evaluation.retrieval import examples

    settings = [{"task": task, "length": length} for task in tasks for length in lengths]
    answers = ask_questions(
        folder,
        options,
        settings,
        lambda count, **setting: examples(haystack, count, options.seed, **setting),
    )
    save_answers(folder, "tasks", options, answers, plot_tasks)
