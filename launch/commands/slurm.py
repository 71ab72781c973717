"""``longspan slurm``: write, check and submit a batch script that trains a recipe."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from ...trainer.errors import UserError
from ..options import add_recipe_arguments, user_path

if TYPE_CHECKING:
    from ...trainer.recipe.schema import Recipe

TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")
_LONGEST_NOTICE = 65535  # s, the largest time of #SBATCH --signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a batch script for SLURM that trains a recipe on several nodes: it stops the run "
        "before its time is up, saves, and requeues itself. The degrees of parallelism are checked "
        "first."
    )
    add_recipe_arguments(parser, example="parallel.cp=8")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="(default 8; 0 for CPUs)"
    )
    parser.add_argument(
        "--processes-per-node", type=int, metavar="N", help="(default: one for each GPU)"
    )
    parser.add_argument(
        "--cpus-per-task", type=int, metavar="N", help="CPU cores of the job on each node"
    )
    parser.add_argument(
        "--time", required=True, metavar="T", help="minutes, HH:MM:SS or D-HH:MM:SS"
    )
    parser.add_argument(
        "--notice",
        type=int,
        default=300,
        metavar="S",
        help="seconds that the job has to save before its end (default 300)",
    )
    for name in ("account", "partition", "qos", "job-name"):
        parser.add_argument(f"--{name}", metavar="NAME")
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell command to run first, such as 'source .venv/bin/activate'; repeatable",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="most restarts within the job after a rank has died (default 3)",
    )
    parser.add_argument(
        "--requeues",
        type=int,
        default=100,
        metavar="N",
        help="most times that the job is requeued (default 100)",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="FILE",
        help="script to write (default: slurm/train.sbatch in the run's folder)",
    )
    parser.add_argument("--submit", action="store_true")


def run(options: argparse.Namespace) -> None:
    """Write the script to the run's folder, and submit it with ``--submit``.

    Raises:
        UserError: if the recipe does not fit the processes, or the time the notice; if Slurm is not
            there or refuses the request; or if the files cannot be written.
    """
    recipe = _checked_recipe(options)
    script = render(options, recipe)
    if options.submit:
        _sbatch("--test-only", script=script)  # before anything is written

    path = _write(options, recipe, script)
    if options.submit:
        print(_sbatch(str(path)))
    else:
        print(f"{path}: submit it with sbatch {path}, or with --submit")


def _checked_recipe(options: argparse.Namespace) -> "Recipe":
    """Check the options, and load the recipe for the processes of all nodes."""
    from ...trainer.recipe.file import load_recipe

    problems = [*_problems(options), *_time_problems(options)]
    if problems:
        raise UserError("\n".join(problems))

    per_node = _processes_per_node(options)
    processes = options.nodes * per_node
    try:
        return load_recipe(options.recipe, [*options.overrides, f"launch.processes={processes}"])
    except UserError as error:
        origin = f"--nodes: {options.nodes} with {per_node} processes each are {processes}"
        raise UserError(f"{error}\n{origin}") from None


def _problems(options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the counts and the names."""
    problems = []
    least = dict.fromkeys(("nodes", "processes_per_node", "cpus_per_task", "notice"), 1)
    least |= dict.fromkeys(("gpus_per_node", "restarts", "requeues"), 0)
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            problems.append(f"{_option(name)}: must be at least {smallest}, got {value}")

    for name in ("account", "partition", "qos", "job_name"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(r"\S+", value):
            problems.append(f"{_option(name)}: must be one word, got {value!r}")

    if 0 < options.gpus_per_node < _processes_per_node(options):
        problems.append(
            f"--processes-per-node: {options.processes_per_node}, but --gpus-per-node is "
            f"{options.gpus_per_node}, and each process needs a GPU of its own; "
            f"use at most {options.gpus_per_node}"
        )
    return problems


def _time_problems(options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the job's time and the notice of its end."""
    problems = []
    if options.notice > _LONGEST_NOTICE:
        problems.append(
            f"--notice: must be at most {_LONGEST_NOTICE} s for Slurm, got {options.notice}"
        )
    seconds = _seconds(options.time)
    if seconds is None:
        problems.append(
            f"--time: {options.time} is not a time for Slurm, "
            "such as 90 (minutes), 12:00:00 or 2-00:00:00"
        )
    elif seconds <= options.notice:
        problems.append(
            f"--time: {options.time} leaves no time to train: the job is told to save and stop "
            f"{options.notice} s before its end"
        )
    return problems


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _processes_per_node(options: argparse.Namespace) -> int:
    return options.processes_per_node or options.gpus_per_node or 1


def _seconds(time: str) -> int | None:
    """Return a time of Slurm's in seconds, or None if it is none.

    Slurm reads minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds.
    """
    match = _TIME.fullmatch(time)
    if not match:
        return None
    days, *fields = match.groups()
    values = [int(field) for field in fields if field is not None]

    if days is not None:
        hours, minutes, seconds = [*values, 0, 0][:3]
    elif len(values) == 3:
        hours, minutes, seconds = values
    else:
        hours = 0
        minutes, seconds = [*values, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def render(options: argparse.Namespace, recipe: "Recipe") -> str:
    """Fill in the template of the script."""
    cpus_per_task = options.cpus_per_task
    if (
        cpus_per_task is None and not options.gpus_per_node
    ):  # with GPUs, the whole node is asked for
        cpus_per_task = _processes_per_node(options)
    requested = {
        "account": options.account,
        "partition": options.partition,
        "qos": options.qos,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": cpus_per_task,
        "mem": 0 if options.gpus_per_node else None,  # 0 is all memory of the node
    }
    directives = [
        f"#SBATCH --{name}={value}" for name, value in requested.items() if value is not None
    ]
    if options.gpus_per_node:
        directives.append("#SBATCH --exclusive")

    values = {
        "name": shlex.quote(options.job_name or Path(recipe.run_dir).name),
        "nodes": options.nodes,
        "time": options.time,
        "notice": options.notice,
        "options": "\n".join(directives) or "# no other options were given",
        "setup": "\n".join(options.setup) or ":  # given with --setup",
        "folder": shlex.quote(str(Path.cwd())),  # paths in the recipe are relative to it
        "run_dir": shlex.quote(str(Path(recipe.run_dir).absolute())),
        "processes": _processes_per_node(options),
        "restarts": options.restarts,
        "requeues": options.requeues,
        "arguments": shlex.join([options.recipe, *options.overrides]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[match[1]]), TEMPLATE.read_text())


def _write(options: argparse.Namespace, recipe: "Recipe", script: str) -> Path:
    """Write the script, and make the folder of the job's output; return the script's path."""
    from ...trainer.checkpoint.atomic import replace_file

    logs = Path(recipe.run_dir, "slurm")
    path = Path(options.out or logs / "train.sbatch")
    try:
        logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its output
    except OSError as error:
        raise _not_writable("run_dir", logs, error) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, script)
    except OSError as error:
        raise _not_writable("--out" if options.out else "run_dir", path, error) from None
    return path


def _not_writable(key: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{key}: {path} cannot be written: {error.strerror}; choose another")


def _sbatch(*arguments: str, script: str | None = None) -> str:
    """Run sbatch, with the script on stdin if it is given, and return what it answers."""
    if not shutil.which("sbatch"):
        raise UserError(
            "--submit: there is no sbatch here; run it on a login node, "
            "or write the script here and take it there"
        )
    done = subprocess.run(
        ["sbatch", *arguments], input=script, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (line.removeprefix("sbatch: error: ").strip() for line in done.stderr.splitlines())
        raise UserError(f"--submit: Slurm refuses the job: {' '.join(lines)}")
    return done.stdout.strip()
