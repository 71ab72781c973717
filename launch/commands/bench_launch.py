"""``longspan bench launch``: what a call of attention costs the host beside its kernels."""

import argparse

from ..options import add_out_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time what a call of attention on a GPU costs the host, forward and backward, beside the "
        "bare launches of the same kernels. Needs no GPU."
    )
    parser.add_argument(
        "--patterns",
        nargs="+",
        default=["Causal()", "S2(64, 16, 16)"],
        metavar="PATTERN",
        help="(default: Causal() and S2(64, 16, 16))",
    )
    parser.add_argument(
        "--documents",
        nargs="+",
        type=int,
        default=[1, 1000],
        metavar="N",
        help="documents in a sequence (default 1 and 1000)",
    )
    parser.add_argument("--heads", type=int, default=8, help="(default 8)")
    parser.add_argument("--kv-heads", type=int, default=2, help="(default 2)")
    parser.add_argument("--repeats", type=int, default=300, help="(default 300)")
    add_out_folder(parser, files="launch.json")


def run(options: argparse.Namespace) -> int:
    from ..bench.launch import bench_launch

    bench_launch(options)
    return 0
