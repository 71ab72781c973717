"""Models of ``transformers`` as they are read from a folder."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """A model that transformers has loaded from a folder."""

    model: "PreTrainedModel"
    missing: set[str]
    """Parameters and buffers that the folder's files do not have, unless tied to one that they
    have."""
    unexpected: set[str]
    """Tensors that the files have and the model does not."""


def load_folder(folder: str | Path, what: str, **options: Any) -> LoadedModel:
    """Load the model of ``folder`` with the ``options`` of ``from_pretrained``.

    Weights in safetensors files that need no conversion are only read when they are used.

    Raises:
        UserError: beginning with ``what``; the model cannot be loaded, or tensors have other shapes
            than its config says.
    """
    from transformers import AutoModelForCausalLM

    with loading(what):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )

    mismatched = defaultdict(list)
    for name, file_shape, config_shape in sorted(info["mismatched_keys"]):
        shapes = f"shape {list(file_shape)} in its files, {list(config_shape)} by its config.json"
        mismatched[shapes].append(name)
    if mismatched:
        lines = [f"{what}: {abbreviated(names)}: {shapes}" for shapes, names in mismatched.items()]
        raise UserError("\n".join(lines))
    return LoadedModel(model, info["missing_keys"], info["unexpected_keys"])


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Report whatever transformers raises as a UserError that begins with ``what``: each part of
    the library has exceptions of its own.
    """
    silence_libraries()
    try:
        yield
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{what}: transformers cannot load it: {reason}") from None


def abbreviated(names: Iterable[str]) -> str:
    """Return the names as a list in words; those that differ only in numbers become one pattern."""
    by_pattern = defaultdict(list)
    for name in names:
        by_pattern[re.sub(r"\.\d+(?=\.)", ".*", name)].append(name)
    return ", ".join(
        f"{pattern} ({len(alike)} of them)" if len(alike) > 1 else alike[0]
        for pattern, alike in by_pattern.items()
    )


def silence_libraries() -> None:
    """Turn off what transformers and DeepSpeed print about themselves.

    transformers draws bars that last for moments, and warns that kernels are missing that a CPU
    cannot have. DeepSpeed, which it looks for, warns that there is no GPU.
    """
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
