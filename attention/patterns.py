"""Which keys a query may see: small frozen values, one answer per KV head.

A KV head is addressed by its index in the whole model, so a rank that owns heads 4..7 asks for ``pattern.from_head(4)``
and gets the same masks as the model on one device. Positions count from the start of a document.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The key blocks ``start, start + step, ...``, ``count`` of them, in units of a pattern's ``block``."""

    start: int
    step: int
    count: int

    def positions(self, block: int, device: torch.device | None = None) -> Tensor:
        """Token positions of these blocks: int64 ``[count * block]``."""
        blocks = self.start + self.step * torch.arange(self.count, device=device)
        return (blocks[:, None] * block + torch.arange(block, device=device)).flatten()


class Pattern(ABC):
    """Base of all patterns. ``block`` is the granularity to which document starts must be aligned."""

    block: int = 1

    @abstractmethod
    def from_head(self, first: int) -> "Pattern":
        """The same pattern for KV heads ``first, first + 1, ...``."""

    @abstractmethod
    def mask(self, query_positions: Tensor, key_positions: Tensor, num_kv_heads: int) -> Tensor:
        """The definition, and the oracle of every backend: bool ``[num_kv_heads, queries, keys]``."""

    @abstractmethod
    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        """Key blocks that some query in ``[query_start, query_stop)`` sees through KV head ``head``.

        Disjoint and ascending within each range. A block may hold keys that the mask then hides.
        """

    @abstractmethod
    def density(self, length: int) -> float:
        """Visible pairs as a share of the causal triangle over ``length`` tokens."""

    @abstractmethod
    def covers(self, num_kv_heads: int) -> bool:
        """Whether every earlier position is seen through at least one of the heads."""


@dataclass(frozen=True)
class Causal(Pattern):
    """Every query sees itself and all that came before."""

    def from_head(self, first: int) -> "Causal":
        return self

    def mask(self, query_positions: Tensor, key_positions: Tensor, num_kv_heads: int) -> Tensor:
        return (query_positions[:, None] >= key_positions).expand(num_kv_heads, -1, -1)

    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        return (Blocks(0, 1, query_stop),)

    def density(self, length: int) -> float:
        return 1.0

    def covers(self, num_kv_heads: int) -> bool:
        return True


@dataclass(frozen=True)
class S2(Pattern):
    """S2-Attention (arXiv 2407.17678): a local band of blocks and vertical stripes that differ per KV head.

    Block ``i`` of queries sees block ``j <= i`` of keys where ``i - j < local_blocks`` or ``j = r_h (mod stride)``, with
    ``r_h = -(h * head_step) mod stride``; causal within a block. DKernel takes ``head_step = max(1, stride // heads)``,
    which :meth:`spread` does here over KV heads, so that few heads still cover the context evenly.
    """

    block: int = 64
    local_blocks: int = 16
    stride: int = 16
    head_step: int = 1
    first_head: int = 0

    def __post_init__(self):
        for name in ("block", "local_blocks", "stride", "head_step"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"S2.{name} must be at least 1, got {value}")
        if self.block & (self.block - 1):
            raise ValueError(f"S2.block must be a power of two, got {self.block}")

    @classmethod
    def spread(cls, num_kv_heads: int, *, block: int, local_blocks: int, stride: int) -> "S2":
        """The pattern whose stripes are spread evenly over ``num_kv_heads`` heads (of the whole model)."""
        return cls(block, local_blocks, stride, head_step=max(1, stride // num_kv_heads))

    def from_head(self, first: int) -> "S2":
        return replace(self, first_head=self.first_head + first)

    def residue(self, head: int) -> int:
        """The stripe of KV head ``head``: it sees key blocks that are this, modulo ``stride``."""
        return -(self.first_head + head) * self.head_step % self.stride

    def mask(self, query_positions: Tensor, key_positions: Tensor, num_kv_heads: int) -> Tensor:
        query_blocks, key_blocks = query_positions[:, None] // self.block, key_positions // self.block
        local = query_blocks - key_blocks < self.local_blocks
        residues = torch.tensor([self.residue(h) for h in range(num_kv_heads)], device=key_positions.device)
        stripes = key_blocks % self.stride == residues[:, None]
        return (query_positions[:, None] >= key_positions) & (local | stripes[:, None])

    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        band = max(0, query_start // self.block - self.local_blocks + 1)
        last = (query_stop - 1) // self.block
        residue = self.residue(head)
        stripes = Blocks(residue, self.stride, len(range(residue, band, self.stride)))
        return (stripes, Blocks(band, 1, last - band + 1))

    def density(self, length: int) -> float:
        blocks = -(-length // self.block)
        far = max(0.0, 1 - self.local_blocks / blocks)
        return 1 - far**2 * (1 - 1 / self.stride)

    def covers(self, num_kv_heads: int) -> bool:
        return len({self.residue(h) for h in range(num_kv_heads)}) == self.stride
