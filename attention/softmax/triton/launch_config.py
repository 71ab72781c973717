"""How the kernels are launched: a table for each kind of GPU, and no tuning while training."""

from dataclasses import dataclass

from ...triton_device import has_bulk_copies


@dataclass(frozen=True)
class KernelConfig:
    """Queries and keys in a tile, warps of a program, and stages of its pipelined loads."""

    queries: int
    keys: int
    warps: int
    stages: int


MAX_HEAD_DIM = 128
"""Beyond this head dim the gradients of keys and values do not fit into registers."""


def kernel_config(
    kernel: str, capability: int, bytes_per_number: int, head_dim: int
) -> KernelConfig:
    """Return the configuration of a kernel.

    Args:
        kernel: ``forward``, ``dq`` or ``dkv``.
        capability: compute capability of the GPU, 90 for 9.0.
        bytes_per_number: size of the inputs' numbers.
        head_dim: the largest head dim of the call.
    """
    if bytes_per_number == 4:
        return KernelConfig(32, 32, 4, 1)
    loads = "tma" if has_bulk_copies(capability) else "pointers"
    return _CONFIGS[kernel][loads, 64 if head_dim <= 64 else MAX_HEAD_DIM]


_CONFIGS = {
    "forward": {
        ("tma", 64): KernelConfig(128, 64, 8, 3),
        ("tma", 128): KernelConfig(128, 64, 8, 3),
        ("pointers", 64): KernelConfig(128, 64, 8, 3),
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
"""By kernel, by how tiles are loaded, and by head dim."""
