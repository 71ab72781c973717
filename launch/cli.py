"""The command line ``longspan COMMAND``: a table of commands, each a module.

A command's module has ``add_arguments(parser)`` and ``run(options)``, which returns an exit status
or None for 0. Its heavy imports are inside ``run``, so that ``--help`` answers at once.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .. import __version__
from .process import exit_status, quiet_libraries


@dataclass(frozen=True)
class Command:
    """A command: its line in the list of commands, and its module in this package."""

    help: str
    module: str

    def fill(self, parser: argparse.ArgumentParser) -> None:
        module = import_module(f".{self.module}", __package__)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)


@dataclass(frozen=True)
class Group:
    """A command that has commands of its own."""

    help: str
    commands: dict[str, Command]

    def fill(self, parser: argparse.ArgumentParser) -> None:
        _add_commands(parser, self.commands)


COMMANDS: dict[str, Command | Group] = {
    "train": Command("train a recipe", "commands.train"),
    "recipes": Command("list the shipped recipes, or all keys of a recipe", "commands.recipes"),
    "data": Group(
        "prepare data",
        {"build": Command("tokenize text to a .bin/.idx corpus", "commands.data_build")},
    ),
    "generate": Command("sample text from a trained run", "commands.generate"),
    "export": Command("write a run's model for transformers", "commands.export"),
    "check-export": Command(
        "compare an exported model's logits with its run's", "commands.check_export"
    ),
    "verify": Command("compare a recipe's layers over ranks with one rank", "commands.verify"),
    "plan": Command("predict memory, messages and time on GPUs", "commands.plan"),
    "rehearse": Command(
        "run a recipe's training step on a GPU that is not here", "commands.rehearse"
    ),
    "slurm": Command("write, check and submit a batch script", "commands.slurm"),
    "eval": Group(
        "measure what a trained run can do",
        {
            "mqar": Command("recall (MQAR) at trained and longer lengths", "commands.eval_mqar"),
            "loss": Command("held-out loss by position in the context", "commands.eval_loss"),
            "needle": Command("retrieval of a number hidden in a text", "commands.eval_needle"),
            "tasks": Command("tasks in the style of RULER", "commands.eval_tasks"),
        },
    ),
    "doctor": Command(
        "show what this machine has for training, and what it lacks", "commands.doctor"
    ),
    "status": Command(
        "show a run's progress, and which of its checkpoints are whole", "commands.status"
    ),
    "plot": Command("draw a run's loss curve", "commands.plot"),
    "show-pattern": Command("draw what each KV head sees", "commands.show_pattern"),
    "bench": Group(
        "measure speed, memory and recall",
        {
            "attention": Command(
                "softmax attention against dense kernels", "commands.bench_attention"
            ),
            "linear": Command("linear attention against its length", "commands.bench_linear"),
            "parallel": Command("attention over ranks against one rank", "commands.bench_parallel"),
            "memory": Command(
                "memory of a training step, and the longest sequence", "commands.bench_memory"
            ),
            "launch": Command("what a call of attention costs the host", "commands.bench_launch"),
            "train": Command("the training loop against a plain one", "commands.bench_train"),
            "mqar": Command("recall (MQAR) of the mixers", "commands.bench_mqar"),
        },
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit.

    0 done, 2 bad input (one line per problem on stderr), 3 loss not finite, 75 stopped on request,
    1 anything else.
    """
    parser = argparse.ArgumentParser(
        prog="longspan", description="Pretrain language models on very long sequences."
    )
    parser.add_argument("--version", action="version", version=f"longspan {__version__}")
    _add_commands(parser, COMMANDS)

    options, rest = parser.parse_known_args(arguments)
    # argparse accepts no positionals after an option, but an override may stand anywhere.
    if "overrides" in options and all(map(_is_override, rest)):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    quiet_libraries()
    sys.exit(exit_status(lambda: options.run(options)))


class _CommandParser(argparse.ArgumentParser):
    """The parser of a command, which adds the command's arguments when it first parses.

    So the module of a command is imported only if the command is given.
    """

    def __init__(self, *, command: Command | Group, **options: Any):
        super().__init__(**options)
        self._command: Command | Group | None = command

    def parse_known_args(self, args=None, namespace=None):
        if self._command:
            self._command.fill(self)
            self._command = None
        return super().parse_known_args(args, namespace)


def _add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, Command | Group]) -> None:
    subparsers = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=_CommandParser
    )
    for name, command in commands.items():
        subparsers.add_parser(name, help=command.help, command=command)


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")
