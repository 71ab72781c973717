"""Models of ``transformers`` as they are read from a folder."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Loaded:
    model: "nn.Module"
    missing: set[str]
    """Parameters and buffers that the folder's files have not, and that are not tied to one that they have."""
    unexpected: set[str]
    """What the files have and the model has not."""


def load_folder(folder: str | Path, what: str, **options) -> Loaded:
    """The model of ``folder``, with the ``options`` of ``from_pretrained``. Weights that are files of safetensors as the model
    takes them are not read before they are used.

    Raises:
        UserError: beginning with ``what``; it cannot be loaded, or tensors have other shapes than its config says.
    """
    from transformers import AutoModelForCausalLM

    with loading(what):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    shapes = defaultdict(list)
    for name, has, needs in sorted(found["mismatched_keys"]):
        shapes[f"{list(has)} in its files, {list(needs)} by its config.json"].append(name)
    if shapes:
        raise UserError(
            "\n".join(f"{what}: {listed(names)}: {how}" for how, names in shapes.items())
        )
    return Loaded(model, found["missing_keys"], found["unexpected_keys"])


@contextmanager
def loading(what: str) -> Iterator[None]:
    """What the library raises of a folder is of any kind: each of its parts has its own."""
    quiet()
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{what}: transformers cannot load it: {(str(error) or repr(error)).splitlines()[0]}"
        ) from None


def listed(names: list[str]) -> str:
    """All of them, those that differ in numbers alone as one pattern."""
    alike = defaultdict(list)
    for name in names:
        alike[re.sub(r"\.\d+(?=\.)", ".*", name)].append(name)
    return ", ".join(
        f"{pattern} ({len(some)} of them)" if len(some) > 1 else some[0]
        for pattern, some in alike.items()
    )


def quiet() -> None:
    """The library draws bars for moments, and warns that it computes without kernels that a CPU has not; DeepSpeed, which it
    looks for, that there is no GPU.
    """
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
