"""``weights.safetensors`` of a run: the whole weights by global name, and the step they are of."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""torch's names and those of the format, in the order of the file: the widest first, so that all
tensors are aligned.
"""


def write_weights(
    file: Path, weights: Mapping[str, "Tensor"], read: Callable[[str], "Tensor"], step: int
) -> None:
    """Write the weights after ``step``, whole or not at all; one tensor is in memory at a time.

    The bytes are those that ``safetensors.torch.save_file`` writes.

    Args:
        weights: of the right shape and dtype, by name; may be on the meta device.
        read: returns the values of a tensor by its name, in any float dtype, on the CPU.

    Raises:
        UserError: they could not be written.
    """
    partial = file.with_suffix(".partial")
    try:
        with partial.open("wb") as out:
            _write(out, weights, read, step)
            out.flush()
            os.fsync(out.fileno())
        partial.rename(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        again = "the checkpoint is whole: the same command writes the weights again"
        raise UserError(f"{file}: could not be written: {error}; {again}") from None


def _write(
    out: BinaryIO, weights: Mapping[str, "Tensor"], read: Callable[[str], "Tensor"], step: int
) -> None:
    import torch

    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in weights.items()}
    order = list(_DTYPES)
    names = sorted(weights, key=lambda name: (order.index(dtypes[name]), name))
    header: dict[str, dict] = {"__metadata__": {"step": str(step)}}
    end = 0
    for name in names:
        weight = weights[name]
        start = end
        end += weight.numel() * weight.element_size()
        header[name] = {
            "dtype": _DTYPES[dtypes[name]],
            "shape": [*weight.shape],
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    out.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        values = read(name).to(weights[name].dtype).contiguous()
        out.write(values.flatten().view(torch.uint8).numpy().data)


def weights_step(file: Path) -> int | None:
    """Return the step that the weights are of, or None if there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            return int(weights.metadata()["step"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None
