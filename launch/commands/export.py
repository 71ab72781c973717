"""``longspan export``: write a run's model for transformers."""

import argparse
import os
from pathlib import Path

from ..options import user_path
from ..process import process_group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a run's model to a folder that transformers can load: as one of its own "
        "architectures if the layers match one exactly, otherwise with custom code. The logits are "
        "compared with the run's before the folder gets its name."
    )
    parser.add_argument(
        "run_dir",
        type=user_path,
        metavar="RUN[@STEP]",
        help="a run's folder; without @STEP, its newest checkpoint",
    )
    parser.add_argument("out", type=user_path, metavar="OUT", help="folder to create")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the weights (default: as trained)",
    )


def run(options: argparse.Namespace) -> None:
    """See :func:`longspan.trainer.huggingface.export.export_run`."""
    from ...trainer.huggingface.export import export_run

    with process_group(os.cpu_count() or 1, alone=True):
        export_run(
            options.run_dir,
            Path(options.out),
            options.dtype,
            lambda line: print(line, flush=True),
        )
    print(f"{options.out}: exported")
