"""``longspan bench attention``: softmax attention under patterns against dense kernels."""

import argparse

from ..options import add_dtype, add_out_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check, then time softmax attention under patterns against dense kernels, in turns."
    )
    parser.add_argument(
        "--pattern",
        action="append",
        metavar="EXPR",
        help="repeatable (default 'S2(64, 16, 16)' and 'Window(1024)')",
    )
    parser.add_argument(
        "--lengths", default="8192,32768", metavar="T,T", help="tokens (default %(default)s)"
    )
    parser.add_argument(
        "--backend",
        default="torch",
        help="of longspan: torch (default), triton, flash, reference or auto",
    )
    parser.add_argument("--heads", type=int, default=4, help="(default 4)")
    parser.add_argument("--kv-heads", type=int, default=4, help="(default 4)")
    parser.add_argument("--head-dim", type=int, default=64, help="(default 64)")
    add_dtype(parser)
    parser.add_argument("--repeats", type=int, default=5, help="(default 5)")
    add_out_folder(parser, files="attention.json and .png")


def run(options: argparse.Namespace) -> None:
    from ..bench.attention import bench_attention

    bench_attention(options)
