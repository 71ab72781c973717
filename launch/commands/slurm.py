"""``longspan slurm RECIPE``: a batch script for a recipe, checked, and where asked for submitted."""

import re
import shlex
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

from ...trainer.checkpoint.atomic import replace_file
from ...trainer.errors import UserError
from ...trainer.recipe.file import load_recipe
from ...trainer.recipe.schema import Recipe

TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")
_LONGEST_NOTICE = 65535  # s; Slurm takes no longer one


def slurm(options: Namespace) -> None:
    """Write the script to the run's folder, and submit it where asked for.

    Raises:
        UserError: the recipe does not fit the processes, or the time the notice; Slurm is not there or refuses the request;
            or the files cannot be written.
    """
    recipe = _checked(options)
    text = rendered(options, recipe)
    if options.submit:
        _sbatch("--test-only", script=text)
    script = _written(options, recipe, text)
    print(
        _sbatch(str(script))
        if options.submit
        else f"{script}: submit it with sbatch {script}, or with --submit"
    )


def _sbatch(*arguments: str, script: str | None = None) -> str:
    """What it answers."""
    if not shutil.which("sbatch"):
        raise UserError(
            "--submit: there is no sbatch here; run it on a login node, or write the script here and take it there"
        )
    done = subprocess.run(
        ["sbatch", *arguments], input=script, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join(
            line.removeprefix("sbatch: error: ").strip() for line in done.stderr.splitlines()
        )
        raise UserError(f"--submit: Slurm refuses the job: {said}")
    return done.stdout.strip()


def _written(options: Namespace, recipe: Recipe, text: str) -> Path:
    logs = Path(recipe.run_dir, "slurm")
    script = Path(options.out or logs / "train.sbatch")
    option, path = "run_dir", logs
    try:
        logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its output
        option, path = "--out" if options.out else "run_dir", script
        script.parent.mkdir(parents=True, exist_ok=True)
        replace_file(script, text)
    except OSError as error:
        raise UserError(
            f"{option}: {path} cannot be written: {error.strerror}; choose another"
        ) from None
    return script


def rendered(options: Namespace, recipe: Recipe) -> str:
    """The script."""
    asked = {
        "account": options.account,
        "partition": options.partition,
        "qos": options.qos,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_task,
        "mem": 0 if options.gpus_per_node else None,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None]
    if options.gpus_per_node:
        lines.append("#SBATCH --exclusive")
    values = {
        "name": shlex.quote(options.job_name or Path(recipe.run_dir).name),
        "nodes": options.nodes,
        "time": options.time,
        "notice": options.notice,
        "options": "\n".join(lines) or "# no other options were asked for",
        "setup": "\n".join(options.setup) or ":  # given with --setup",
        "folder": shlex.quote(str(Path.cwd())),  # where the recipe's paths begin
        "run_dir": shlex.quote(str(Path(recipe.run_dir).absolute())),
        "processes": _per_node(options),
        "restarts": options.restarts,
        "requeues": options.requeues,
        "arguments": shlex.join([options.recipe, *options.overrides]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[match[1]]), TEMPLATE.read_text())


def _per_node(options: Namespace) -> int:
    return options.processes_per_node or options.gpus_per_node or 1


def _checked(options: Namespace) -> Recipe:
    least = dict.fromkeys(("nodes", "processes_per_node", "cpus_per_task", "notice"), 1)
    least |= dict.fromkeys(("gpus_per_node", "restarts", "requeues"), 0)
    problems = [
        f"--{name.replace('_', '-')}: must be at least {number}, got {given}"
        for name, number in least.items()
        if (given := getattr(options, name)) is not None and given < number
    ]
    problems += [
        f"--{name.replace('_', '-')}: must be one word, got {given!r}"
        for name in ("account", "partition", "qos", "job_name")
        if (given := getattr(options, name)) is not None and not re.fullmatch(r"\S+", given)
    ]
    if 0 < options.gpus_per_node < _per_node(options):
        problems.append(
            f"--processes-per-node: {options.processes_per_node}, but --gpus-per-node is {options.gpus_per_node}, and each "
            f"process needs a GPU of its own; use at most {options.gpus_per_node}"
        )
    if options.notice > _LONGEST_NOTICE:
        problems.append(
            f"--notice: must be at most {_LONGEST_NOTICE} s for Slurm, got {options.notice}"
        )
    seconds = _seconds(options.time)
    if seconds is None:
        problems.append(
            f"--time: {options.time} is no time of Slurm's, as 90 (minutes), 12:00:00 or 2-00:00:00"
        )
    elif seconds <= options.notice:
        problems.append(
            f"--time: {options.time} leaves nothing: a job is told {options.notice} s before its end to save and stop"
        )
    if problems:
        raise UserError("\n".join(problems))
    count = options.nodes * _per_node(options)
    try:
        return load_recipe(options.recipe, [*options.overrides, f"launch.processes={count}"])
    except UserError as error:
        raise UserError(
            f"{error}\n--nodes: {options.nodes} with {_per_node(options)} processes each are {count}"
        ) from None


def _seconds(time: str) -> int | None:
    """Of minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds."""
    match = _TIME.fullmatch(time)
    if not match:
        return None
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, minutes, seconds = given
    else:
        hours, (minutes, seconds) = 0, [*given, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
