"""``longspan bench parallel``: attention over context-parallel ranks against one rank."""

import argparse

from ..options import add_out_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time the operations over context-parallel ranks, processes of one thread on this CPU, "
        "against one rank, in turns."
    )
    parser.add_argument("--ranks", type=int, default=2, help="(default 2)")
    parser.add_argument("--length", type=int, default=16384, help="tokens (default %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(default 4)")
    parser.add_argument("--kv-heads", type=int, default=2, help="(default 2)")
    parser.add_argument("--head-dim", type=int, default=64, help="(default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="(default 3)")
    add_out_folder(parser, files="parallel.json and .png")


def run(options: argparse.Namespace) -> int:
    from ..bench.parallel import bench_parallel

    return bench_parallel(options)
