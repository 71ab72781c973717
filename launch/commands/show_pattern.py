"""``longspan show-pattern``: draw what each KV head sees."""

import argparse

from ..options import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw an attention pattern, or those of a recipe, and print its density and ideal speed-up."
    )
    parser.add_argument(
        "pattern", metavar="EXPR|RECIPE", help="such as 'S2(64, 16, 16) | Sinks(4)', or a recipe"
    )
    parser.add_argument(
        "-o", "--out", type=user_path, required=True, metavar="PNG", help="file to draw to"
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="KV heads (default 4; a recipe has its own)"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="T",
        help="tokens (default: enough to show the structure, or the recipe's)",
    )


def run(options: argparse.Namespace) -> None:
    from ..pattern_picture import show_pattern

    show_pattern(options.pattern, options.out, options.heads, options.length)
