"""``longspan eval tasks``: tasks in the manner of RULER, by the text's length."""

import argparse

from ..options import add_evaluated_text, add_examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a run on tasks in the style of RULER: find several numbers in held-out text, one "
        "among many, one that is passed on from name to name; find the most frequent word."
    )
    add_evaluated_text(parser)
    add_examples(parser, default=50)
    parser.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        help="multi_query, multi_key, variable_tracking, frequent_words (default: all)",
    )


def run(options: argparse.Namespace) -> None:
    from ..evaluation import ask_questions, open_haystack, open_run, save_answers

    folder = open_run(options, "tasks")

    from ...trainer.evaluation.tasks import choose_tasks

    tasks = choose_tasks(options.tasks.split(",") if options.tasks else None)
    haystack, lengths = open_haystack(folder, options)

    from ...trainer.evaluation.examples import task_examples
    from ...trainer.evaluation.plots import plot_tasks

    settings = [{"task": task, "length": length} for task in tasks for length in lengths]
    answers = ask_questions(
        folder,
        options,
        settings,
        lambda count, **setting: task_examples(haystack, count, options.seed, **setting),
    )
    save_answers(folder, "tasks", options, answers, plot_tasks)
