"""``longspan bench train``: the training loop against a plain one."""

import argparse

from ..options import add_model_size, add_out_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time the steps of a Llama's training by longspan, by a plain PyTorch loop and by the "
        "Trainer of transformers on this CPU, in turns."
    )
    add_model_size(parser, vocabulary=8192)
    add_out_folder(parser, files="train.json")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens per sequence (default 2048)"
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences per step (default 2)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per turn (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default 3)")


def run(options: argparse.Namespace) -> None:
    from ..bench.train import bench_train

    bench_train(options)
