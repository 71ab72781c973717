"""Launch shapes of the kernels: a table, no tuning while training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelConfig:
    """Rows of queries and of keys in a tile, warps of a program, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


CHIPS = (80, 90, 100, 103)
"""Compute capabilities that the table is for; others have less shared memory."""
MAX_DIM = 128
"""Beyond it the gradients of keys and values do not fit into registers."""


def shape(kernel: str, capability: int, bytes_per_number: int, dim: int) -> KernelConfig:
    """Of ``kernel`` (forward, dq or dkv) on a GPU of compute ``capability`` (90 for 9.0), for head dims up to ``dim``."""
    row = _SHAPES[kernel]
    dim = 64 if dim <= 64 else MAX_DIM
    if bytes_per_number == 4:
        return KernelConfig(32, 32, 4, 1)
    return row["tma" if capability >= 90 else "pointers", dim]


_SHAPES = {
    "forward": {
        ("tma", 64): KernelConfig(128, 64, 8, 3),
        ("tma", 128): KernelConfig(128, 64, 8, 3),
        ("pointers", 64): KernelConfig(128, 64, 4, 3),
        ("pointers", 128): KernelConfig(64, 64, 4, 2),
    },
    "dq": {
        ("tma", 64): KernelConfig(128, 64, 8, 3),
        ("tma", 128): KernelConfig(128, 64, 8, 2),
        ("pointers", 64): KernelConfig(128, 64, 8, 2),
        ("pointers", 128): KernelConfig(64, 64, 8, 2),
    },
    "dkv": {
        ("tma", 64): KernelConfig(32, 64, 4, 2),
        ("tma", 128): KernelConfig(32, 64, 8, 2),
        ("pointers", 64): KernelConfig(32, 64, 4, 2),
        ("pointers", 128): KernelConfig(32, 64, 8, 2),
    },
}
