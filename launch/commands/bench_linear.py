"""``longspan bench linear``: the operation of every linear mixer against the sequence length."""

import argparse

from ..options import add_dtype, add_out_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check, then time every linear mixer's operation against the length, and dense attention, "
        "in turns."
    )
    parser.add_argument(
        "--mixer",
        action="append",
        metavar="NAME",
        help="repeatable (default: all linear mixers)",
    )
    parser.add_argument(
        "--lengths", default="4096,16384,65536", metavar="T,T", help="tokens (default %(default)s)"
    )
    parser.add_argument(
        "--dense-up-to",
        type=int,
        default=32768,
        metavar="T",
        help="skip dense attention over more tokens (default %(default)s)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        help="torch, triton, fla, reference or auto: on CUDA the first three, else torch (default)",
    )
    parser.add_argument("--heads", type=int, default=4, help="(default 4)")
    parser.add_argument("--head-dim", type=int, default=64, help="(default 64)")
    add_dtype(parser)
    parser.add_argument("--repeats", type=int, default=5, help="(default 5)")
    add_out_folder(parser, files="linear.json and .png")


def run(options: argparse.Namespace) -> None:
    from ..bench.linear import bench_linear

    bench_linear(options)
