"""``longspan bench mqar``: recall (MQAR) of the mixers, over learning rates and seeds."""

import argparse

from ..options import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train recipes of the recall task with several learning rates and seeds, and tabulate "
        "what they reach. If it is killed, the same command resumes."
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="files or shipped names (default: all of mqar/)",
    )
    parser.add_argument(
        "--lrs", default="1e-2,3e-3", metavar="LR,LR", help="learning rates (default %(default)s)"
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="(default %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, with one thread each (default 2)"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: as in the recipes)")
    parser.add_argument(
        "--examples",
        type=int,
        default=500,
        help="examples of each length and number of pairs (default 500)",
    )
    parser.add_argument(
        "--work",
        type=user_path,
        default="runs/mqar",
        metavar="FOLDER",
        help="folder of the runs (default %(default)s)",
    )
    # The default is this repository's own page: outside of a clone, give --out.
    parser.add_argument(
        "--out",
        type=user_path,
        default="docs/mqar",
        metavar="PREFIX",
        help="writes PREFIX.json, .md, .png (default %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    from ..bench.mqar import bench_mqar

    return bench_mqar(options)
