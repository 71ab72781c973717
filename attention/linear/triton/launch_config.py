"""How the kernels are launched: a table for each kind of GPU, and no tuning while training."""

from dataclasses import dataclass

from ...triton_device import has_bulk_copies


@dataclass(frozen=True)
class ScanConfig:
    """How the chunk scan is launched."""

    chunk: int
    """Tokens of a chunk."""
    block: int
    """Dims of ``Z`` that a program computes."""
    warps: int
    stages: int
    """Loads in flight."""


def scan_config(capability: int, bytes_per_number: int, dim: int) -> ScanConfig:
    """Return how to launch the scan, so that registers all but suffice.

    Args:
        capability: compute capability of the GPU, as 90 for 9.0.
        bytes_per_number: of the inputs.
        dim: of ``X`` and ``Y``.
    """
    if bytes_per_number == 4:  # no tensor cores
        return ScanConfig(16, 16, 8, 1)
    if not has_bulk_copies(capability):  # nor matrix products of four warps together
        return ScanConfig(32, 64, 8, 2)
    return ScanConfig(64, 64, 8 if capability >= 100 else 4, 3 if dim <= 64 else 2)


def padded_dim(dim: int) -> int:
    """Return the dims of a tile that holds ``dim``: matrix products need 16, tiles powers of two."""
    return max(16, 1 << (dim - 1).bit_length())
