"""``longspan check-export``: compare an exported model's logits with its run's."""

import argparse
import os
from pathlib import Path

from ...trainer.errors import UserError
from ..options import user_path
from ..process import process_group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=user_path,
        metavar="OUT",
        help="a folder that longspan export wrote",
    )
    parser.add_argument(
        "run_dir",
        type=user_path,
        metavar="RUN[@STEP]",
        help="the run that it was exported from; without @STEP, its newest checkpoint",
    )


def run(options: argparse.Namespace) -> None:
    """See :func:`longspan.trainer.huggingface.check.check_export`."""
    from ...trainer.huggingface.check import check_export
    from ...trainer.huggingface.saved_run import SavedRun

    folder = Path(options.folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{options.folder}: has no config.json; name the folder that longspan export wrote"
        )
    saved = SavedRun(options.run_dir)
    with process_group(os.cpu_count() or 1, alone=True):
        check_export(folder, saved, lambda line: print(line, flush=True))
