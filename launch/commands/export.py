"""``longspan export RUN[@STEP] OUT`` and ``longspan check-export OUT RUN[@STEP]``."""

from pathlib import Path

from ..process import process_group


def export(run: str, out: str, dtype: str | None, threads: int) -> None:
    """See :func:`longspan.trainer.huggingface.export.export_run`."""
    from ...trainer.huggingface.export import export_run

    with process_group(threads, alone=True):
        export_run(run, Path(out), dtype, lambda line: print(line, flush=True))
    print(f"{out}: exported")


def check(folder: str, run: str, threads: int) -> None:
    """See :func:`longspan.trainer.huggingface.check.check_export`."""
    from ...trainer.errors import UserError
    from ...trainer.huggingface.check import check_export
    from ...trainer.huggingface.source import SavedRun

    if not Path(folder, "config.json").is_file():
        raise UserError(f"{folder}: has no config.json; name the folder that longspan export wrote")
    saved = SavedRun(run)
    with process_group(threads, alone=True):
        check_export(Path(folder), saved, lambda line: print(line, flush=True))
