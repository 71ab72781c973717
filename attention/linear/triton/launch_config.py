"""How the kernels are launched: a table for each kind of GPU, and no tuning while training."""

from dataclasses import dataclass

import torch

from ...triton_device import matrix_instruction

MAX_KEY_DIM = 256
"""Beyond this key dim a state does not fit into registers."""


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


def scan_config(capability: int, dtype: torch.dtype, dim: int) -> ScanConfig:
    """Return how to launch the scan, so that registers all but suffice.

    Args:
        capability: compute capability of the GPU, as 90 for 9.0.
        dtype: of the inputs.
        dim: of ``X`` and ``Y``.
    """
    if dtype == torch.float32:  # no tensor cores
        return ScanConfig(16, 16, 8, 1)
    instruction = matrix_instruction(capability)
    if dtype == torch.float16 and dim > 128:  # states are bf16 besides, so registers are short
        return {
            "mma": ScanConfig(16, 16, 4, 2),
            "wgmma": ScanConfig(64, 16, 4, 2),
            "tcgen05": ScanConfig(64, 32, 8, 2),
        }[instruction]
    if instruction == "mma":
        return ScanConfig(32, 64 if dim <= 128 else 16, 8, 2)
    if instruction == "tcgen05":
        return ScanConfig(64, 64, 8, 3 if dim <= 64 else 2)
    return ScanConfig(64, 64 if dim <= 128 else 32, 4, 3 if dim <= 64 else 2)


def max_scan_dim(bytes_per_number: int) -> int:
    """Return the largest dim of the chunk scan, whose programs hold a state in registers.

    Of all key dims and a block of the value dims, or the other way round. The stages never hold all
    value dims, and compute what is beyond.
    """
    return 128 if bytes_per_number == 4 else MAX_KEY_DIM


@dataclass(frozen=True)
class KernelConfig:
    """How one stage is launched."""

    block: int
    """Dims of a tile: value dims in the two scans, key dims in the other stages."""
    warps: int
    stages: int = 2
    """Loads in flight."""

    def options(self) -> dict[str, int]:
        """Return them by the names of a launch's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class StagesConfig:
    """How the stages are launched, by the names of their kernels."""

    chunk: int
    """Tokens of a chunk."""
    value_block: int
    """Value dims of a tile in the stages that are no scans."""
    scores: KernelConfig
    states: KernelConfig
    outputs: KernelConfig
    state_gradients: KernelConfig
    score_gradients: KernelConfig
    input_gradients: KernelConfig


def stages_config(capability: int, bytes_per_number: int, dim: int, by_key: bool) -> StagesConfig:
    """Return how to launch the stages, so that registers all but suffice.

    Args:
        capability: compute capability of the GPU, as 90 for 9.0.
        bytes_per_number: of the inputs.
        dim: of keys.
        by_key: whether there is a decay for each key dim.
    """
    if bytes_per_number == 4:  # no tensor cores
        config = KernelConfig(16, 4, 1)
        scan = KernelConfig(16, 8, 1)
        return StagesConfig(16, 16, config, scan, config, scan, config, config)
    instruction = matrix_instruction(capability)
    is_large = dim > 128
    if instruction == "mma":
        small_scan = KernelConfig(32, 2, 1 if by_key else 2)
        return StagesConfig(
            chunk=32,
            value_block=64,
            scores=KernelConfig(32, 2),
            states=KernelConfig(16 if is_large else 32, 2),
            outputs=KernelConfig(64, 4),
            state_gradients=KernelConfig(16, 4) if is_large else small_scan,
            score_gradients=KernelConfig(64, 2),
            input_gradients=KernelConfig(64, 8),
        )
    if by_key or dim <= 64:
        input_gradients = KernelConfig(32, 8 if by_key else 4)
    else:
        input_gradients = KernelConfig(64, 8)
    state_gradients = KernelConfig(32 if is_large else 64, 8 if instruction == "tcgen05" else 4)
    if is_large and instruction == "tcgen05":
        state_gradients = KernelConfig(16, 8)
    elif by_key and is_large and instruction == "wgmma":  # its loads do not fit twice
        state_gradients = KernelConfig(16, 4, 1)
    return StagesConfig(
        chunk=64,
        value_block=64,
        scores=KernelConfig(32, 8) if by_key else KernelConfig(64, 4),
        states=KernelConfig(
            32 if is_large else 64, 8 if instruction == "tcgen05" and is_large else 4
        ),
        outputs=KernelConfig(64, 4),
        state_gradients=state_gradients,
        score_gradients=KernelConfig(64, 4),
        input_gradients=input_gradients,
    )


def padded_dim(dim: int) -> int:
    """Return the dims of a tile that holds ``dim``, a power of two; matrix products need 16."""
    return max(16, 1 << (dim - 1).bit_length())
