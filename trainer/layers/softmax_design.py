"""What a mixer with softmax attention does. Without torch."""

from dataclasses import dataclass
from typing import Literal

from ...attention.patterns import Pattern, Selector


@dataclass(frozen=True)
class SoftmaxDesign:
    """What a mixer does around :func:`longspan.parallel.attend`, for all heads of the model."""

    pattern: Pattern | Selector
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool | Literal["all"]
    """RMSNorm of queries and keys: of each head, or of all heads together."""
    rotary_dim: int
    """Dims of a head that are rotated; 0 for none."""
    output_gate: bool
    attention_sink: bool
    softcap: float | None

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads
