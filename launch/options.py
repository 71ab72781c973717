"""Options that several commands have, and checks of their values."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..trainer.errors import UserError, suggest
from ..trainer.paths import expand_path

if TYPE_CHECKING:
    from ..trainer.predict.estimate import Device
    from ..trainer.recipe.schema import Recipe

Number = TypeVar("Number", int, float)


def user_path(text: str) -> str:
    """Return the path that an argument names; the ``type`` of all arguments that are paths."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def add_recipe_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the recipe, and ``overrides``, which may also stand after options (see ``cli.main``)."""
    parser.add_argument("recipe", help="path of a YAML recipe, or the name of a shipped one")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=f"such as {example}"
    )


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """Add ``--gpus`` and ``--device``: how many GPUs that are not here, and of which kind.

    See :func:`recipe_on_gpus` and :func:`device_named`.
    """
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="number of GPUs (default: launch.processes of the recipe)",
    )
    parser.add_argument(
        "--device",
        default="h100",
        help="a100, h100 (default), h200, b200, b300, a10, l40s, 4090, 5090 or pro6000",
    )


def device_named(name: str) -> "Device":
    """Return the GPU that ``--device`` names."""
    from ..trainer.predict.estimate import DEVICES

    if name not in DEVICES:
        raise UserError(
            f"--device: unknown{suggest(name, list(DEVICES))}; known: {', '.join(DEVICES)}"
        )
    return DEVICES[name]


# Sequences: a multiple of any likely size of microbatch. A batch of as many for every GPU fits any
# number of them.
_ANY_BATCH = 2**4 * 3**2 * 5 * 7


def recipe_on_gpus(name: str, overrides: list[str], gpus: int | None) -> "Recipe":
    """Load the recipe for this many GPUs, with its batch rounded up to what they need.

    The batch that is asked for does not divide over any number of GPUs, and a recipe with such a
    batch is refused. So the first recipe has a batch that always divides, only to learn how many
    ranks are data parallel; the second has no parallelism, only to learn the batch that is asked
    for.
    """
    from ..trainer.recipe.file import load_recipe

    if gpus is None:
        return load_recipe(name, overrides)
    if gpus < 1:
        raise UserError(f"--gpus: must be at least 1, got {gpus}")

    on_gpus = [*overrides, f"launch.processes={gpus}"]
    any_batch = load_recipe(name, [*on_gpus, f"training.global_batch_size={gpus * _ANY_BATCH}"])
    batch_unit = any_batch.data_parallel * any_batch.training.micro_batch_size

    alone = load_recipe(name, [*overrides, "parallel={}", "launch.processes=1"])
    batch = -(-alone.training.global_batch_size // batch_unit) * batch_unit
    return load_recipe(name, [*on_gpus, f"training.global_batch_size={batch}"])


def add_out_folder(parser: argparse.ArgumentParser, files: str) -> None:
    """Add ``--out``, the folder of a benchmark's ``files``; see :func:`out_folder`."""
    parser.add_argument(
        "--out",
        type=user_path,
        default="bench",
        metavar="FOLDER",
        help=f"folder for {files} (default bench)",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype`` of a benchmark on any device."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )


def add_evaluated_text(parser: argparse.ArgumentParser) -> None:
    """Add the run, and the text that it is asked about, to an ``eval`` command."""
    parser.add_argument("run_dir", type=user_path, metavar="RUN")
    parser.add_argument(
        "--lengths",
        metavar="T,T",
        help="tokens (default: as trained, and twice and four times as many if the text allows)",
    )
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="PREFIX",
        help="corpus of the text (default: the run's held-out text)",
    )


def add_examples(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the number of examples of every setting of an ``eval`` command, and their seed."""
    parser.add_argument(
        "--examples",
        type=int,
        default=default,
        help=f"examples of each setting (default {default})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples (default 0)")


def add_model_size(parser: argparse.ArgumentParser, vocabulary: int) -> None:
    """Add the size of a Llama, as :func:`longspan.launch.bench.plain_model.size_of` reads it."""
    parser.add_argument("--hidden", type=int, default=256, help="(default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default 4)")
    parser.add_argument("--heads", type=int, default=4, help="(default 4)")
    parser.add_argument("--kv-heads", type=int, default=2, help="(default 2)")
    parser.add_argument(
        "--intermediate", type=int, default=768, help="width of the MLPs (default %(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, default=vocabulary, help="(default %(default)s)")


def numbers(
    option: str,
    text: str,
    kind: Callable[[str], Number] = int,
    least: float = 1,
    example: str = "",
) -> list[Number]:
    """Return the numbers of a comma-separated list, in order and without repetition.

    Args:
        option: the option's name, for errors.
        text: its value.
        kind: int or float.
        least: the smallest number that is allowed.
        example: for errors.

    Raises:
        UserError: if a number cannot be read or is too small.
    """
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        example = example or ("64,128" if kind is int else "1e-2,3e-3")
        raise UserError(f"{option}: must be {what}, such as {example}, got {text!r}") from None

    for value in values:
        if not value >= least:  # true for NaN too
            raise UserError(f"{option}: must be at least {least:g}, got {value}")
    return list(dict.fromkeys(values))


def counts(options: argparse.Namespace, *names: str) -> dict[str, int]:
    """Return the values of these options by name.

    Raises:
        UserError: if one is less than 1.
    """
    values: dict[str, int] = {name: getattr(options, name) for name in names}
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    return values


def out_folder(options: argparse.Namespace) -> Path:
    """Make the folder ``--out`` if it is not there, and return it.

    Raises:
        UserError: if it cannot be made or written to.
    """
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made: {error}") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out: {out} cannot be written to")
    return out
