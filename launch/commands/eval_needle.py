"""``longspan eval needle``: whether a run finds a number that is hidden in a text."""

import argparse

from ...trainer.errors import UserError
from ..options import add_evaluated_text, add_examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure whether a run finds a number that is hidden in held-out text, by the length of "
        "the text and the number's depth in it."
    )
    add_evaluated_text(parser)
    add_examples(parser, default=20)
    parser.add_argument(
        "--depths",
        type=int,
        default=5,
        help="number of depths, from the beginning to the end (default 5)",
    )


def run(options: argparse.Namespace) -> None:
    from ..evaluation import ask_questions, open_haystack, open_run, save_answers

    folder = open_run(options, "needle")
    if options.depths < 2:
        raise UserError(f"--depths: must be at least 2, got {options.depths}")
    depths = [i / (options.depths - 1) for i in range(options.depths)]
    haystack, lengths = open_haystack(folder, options)

    from ...trainer.evaluation.examples import needle_examples
    from ...trainer.evaluation.plots import plot_needle

    settings = [{"length": length, "depth": depth} for length in lengths for depth in depths]
    answers = ask_questions(
        folder,
        options,
        settings,
        lambda count, **setting: needle_examples(haystack, count, options.seed, **setting),
    )
    save_answers(folder, "needle", options, answers, plot_needle)
