"""How the kernels are launched: a table for each kind of GPU, and no tuning while training."""

from dataclasses import dataclass

from ...triton_device import matrix_instruction


@dataclass(frozen=True)
class KernelConfig:
    """Queries and keys in a tile, warps of a program, and stages of its pipelined loads."""

    queries: int
    keys: int
    warps: int
    stages: int

    def fit(self, queries: int, keys: int) -> "KernelConfig":
        """Return the configuration for a tile of at most this many queries and keys.

        Of a tile of fewer queries, warps beyond these would compute what others compute as well.
        """
        fewer_queries = min(self.queries, queries)
        warps = max(4, self.warps * fewer_queries // self.queries)
        return KernelConfig(fewer_queries, min(self.keys, keys), warps, self.stages)


MAX_HEAD_DIM = 128
"""Beyond this head dim the gradients of keys and values do not fit into registers."""


def kernel_config(
    kernel: str, capability: int, bytes_per_number: int, head_dim: int
) -> KernelConfig:
    """Return the configuration of a kernel.

    Args:
        kernel: ``forward``, ``dq``, ``dkv``, or ``dkv relative`` for a pattern with relative rules.
        capability: compute capability of the GPU, 90 for 9.0.
        bytes_per_number: size of the inputs' numbers.
        head_dim: the largest head dim of the call.
    """
    if bytes_per_number == 4:
        return KernelConfig(32, 32, 4, 1)
    instruction = matrix_instruction(capability)
    return _CONFIGS[kernel][instruction, 64 if head_dim <= 64 else MAX_HEAD_DIM]


_CONFIGS = {
    "forward": {
        ("mma", 64): KernelConfig(128, 64, 8, 3),
        ("mma", 128): KernelConfig(64, 64, 8, 2),
        ("wgmma", 64): KernelConfig(128, 64, 8, 3),
        ("wgmma", 128): KernelConfig(128, 64, 8, 3),
        ("tcgen05", 64): KernelConfig(128, 64, 8, 3),
        ("tcgen05", 128): KernelConfig(128, 64, 8, 3),
    },
    "dq": {
        ("mma", 64): KernelConfig(128, 64, 8, 2),
        ("mma", 128): KernelConfig(64, 64, 8, 2),
        ("wgmma", 64): KernelConfig(128, 64, 8, 3),
        ("wgmma", 128): KernelConfig(128, 64, 8, 2),
        ("tcgen05", 64): KernelConfig(128, 64, 8, 3),
        ("tcgen05", 128): KernelConfig(128, 64, 8, 2),
    },
    "dkv": {
        ("mma", 64): KernelConfig(32, 64, 4, 2),
        ("mma", 128): KernelConfig(64, 64, 8, 2),
        ("wgmma", 64): KernelConfig(32, 64, 4, 2),
        ("wgmma", 128): KernelConfig(32, 64, 4, 3),
        ("tcgen05", 64): KernelConfig(32, 64, 4, 2),
        ("tcgen05", 128): KernelConfig(32, 64, 8, 2),
    },
}
"""By kernel, by how the GPU multiplies matrices, and by head dim.

More warps than a tile has rows for would compute some of its products twice, which no bound on
registers shows: the ahead-of-time tests count products and exponentials.
"""
# Registers would not suffice for fewer warps, although these compute half of the products twice.
_CONFIGS["dkv relative"] = _CONFIGS["dkv"] | {("wgmma", 128): KernelConfig(32, 64, 8, 2)}
