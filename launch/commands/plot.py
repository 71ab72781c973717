"""``longspan plot``: draw a run's loss curve."""

import argparse

from ..options import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=user_path, metavar="RUN")


def run(options: argparse.Namespace) -> None:
    from ...trainer.checkpoint.run_folder import RunFolder
    from ...trainer.run.plot import plot_loss

    print(plot_loss(RunFolder(options.run_dir)))
