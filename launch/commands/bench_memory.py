"""``longspan bench memory``: memory of a training step, and the longest sequence in a budget."""

import argparse

from ..options import add_model_size, add_out_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure what a training step of a Llama needs besides its weights on this CPU, with each "
        "of the memory options, and with plain PyTorch and transformers."
    )
    add_model_size(parser, vocabulary=32768)
    add_out_folder(parser, files="memory.json and .png")
    parser.add_argument(
        "--budget-mib", type=int, default=1024, help="memory that a step may use (default 1024)"
    )


def run(options: argparse.Namespace) -> None:
    from ..bench.memory import bench_memory

    bench_memory(options)
