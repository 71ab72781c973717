"""``longspan eval mqar``: accuracy of a run in the recall task."""

import argparse

from ..options import add_examples, numbers, user_path
from ..table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the accuracy of a run with data.mqar in the recall task, at trained and longer "
        "lengths."
    )
    parser.add_argument("run_dir", type=user_path, metavar="RUN")
    parser.add_argument(
        "--lengths",
        metavar="T,T",
        help="tokens (default: the trained ones, and twice and four times the hardest)",
    )
    parser.add_argument(
        "--pairs",
        metavar="N,N",
        help="numbers of pairs, at every length that they fit (default: as for --lengths)",
    )
    add_examples(parser, default=500)


def run(options: argparse.Namespace) -> None:
    from ...trainer.evaluation.mqar_settings import choose_settings
    from ..evaluation import draw_plot, inference_engine, open_run

    folder = open_run(options, "mqar")
    lengths = numbers("--lengths", options.lengths) if options.lengths else None
    pairs = numbers("--pairs", options.pairs) if options.pairs else None
    settings = choose_settings(folder.recipe, lengths, pairs)

    # Imports torch, and is not needed to report bad input.
    from ...trainer.evaluation.mqar import evaluate_mqar
    from ...trainer.evaluation.plots import plot_mqar

    with inference_engine(folder) as engine:
        report = evaluate_mqar(folder, engine, settings, options.examples, options.seed)

    print(_table(report))
    draw_plot(folder, "mqar", lambda path, title: plot_mqar(report, path, title))


def _table(report: dict) -> str:
    lines = [("length", "pairs", "accuracy", "")]
    for setting in report["settings"]:
        lines.append(
            (
                f"{setting['length']:,}",
                str(setting["pairs"]),
                f"{setting['accuracy']:.4f}",
                "" if setting["trained"] else "(not trained)",
            )
        )
    num_values = round(1 / report["chance"])
    legend = (
        f"chance: {report['chance']:.4f}, one of {num_values} values; "
        f"{report['examples']} examples of each"
    )
    return f"{table(lines)}\n{legend}"
