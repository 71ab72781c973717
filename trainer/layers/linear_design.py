"""What a mixer with linear attention does, step by step. Without torch."""

from dataclasses import dataclass
from typing import Literal

from .base import Shapes


@dataclass(frozen=True)
class LinearDesign:
    """What a mixer does around :func:`longspan.attention.linear_attention`, in the order in which it does it."""

    heads: int
    """Of values, and so of states."""
    key_heads: int
    """Of queries and keys; a divisor of ``heads``."""
    key_dim: int
    """Of a projected query or key."""
    value_dim: int
    conv_kernel: int = 0
    """Width of the short convolution of queries, keys and values, with SiLU after it; 0 for none."""
    conv_bias: bool = False
    silu: str = ""
    """Which of ``q``, ``k`` and ``v`` go through SiLU where no convolution has done so."""
    rotary: bool = False
    feature_map: Literal["none", "elu", "taylor", "hedgehog", "l2", "lrpe"] = "none"
    """Of queries and keys."""
    decay: Literal["none", "minimax", "paper", "retention", "sigmoid", "softplus"] = "none"
    """Fixed, or of the token: ``logsigmoid(x) / 16``, or ``-exp(A) softplus(x + b)``."""
    decay_rank: int = 0
    """Of the projection that gives every key a decay of its own; 0 for one per head."""
    steps: bool = False
    """Values are multiplied by the step ``softplus(x + b)`` of the decay (Mamba-2's discretisation)."""
    beta: float = 0.0
    """The delta rule with this times a sigmoid; 0 for none."""
    normalised: bool = False
    """Weights sum to one."""
    scale: float = 1.0
    skip: bool = False
    """A learned multiple of each head's values is added to its output."""
    norm: Literal["none", "head", "key_head", "all"] = "none"
    """RMSNorm of the output: of each head, of the heads of one key head together, or of all heads together."""
    norm_weight: bool = True
    gate: Literal["none", "sigmoid", "silu", "identity"] = "none"
    """The output is multiplied by this of a projection."""
    gate_rank: int = 0
    """Of that projection; 0 for a full one."""
    gate_first: bool = False
    """Gate, then norm."""

    @property
    def feature_dim(self) -> int:
        """Rows of a head's state."""
        dim = self.key_dim
        return {"taylor": 1 + dim + dim * (dim + 1) // 2, "hedgehog": 2 * dim, "lrpe": 2 * dim}.get(
            self.feature_map, dim
        )

    @property
    def width(self) -> int:
        """Of all heads' outputs."""
        return self.heads * self.value_dim

    @property
    def group(self) -> int:
        """Heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of one key head in the fused projection: query, key, values; gates, betas, decays."""
        gates = self.group * self.value_dim if self.gate != "none" and not self.gate_rank else 0
        decays = self.group if self.decay in ("sigmoid", "softplus") and not self.decay_rank else 0
        return self.conv_channels // self.key_heads, gates, self.group if self.beta else 0, decays

    @property
    def conv_channels(self) -> int:
        """Queries, keys and values of all heads."""
        return self.key_heads * 2 * self.key_dim + self.width

    @property
    def state_numbers(self) -> int:
        """Numbers of all heads' states."""
        return self.heads * self.feature_dim * (self.value_dim + self.normalised)

    def parameter_shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter of the mixer, by its name there."""
        keys = self.heads * self.key_dim
        shapes: Shapes = {
            "linear_in.weight": (self.key_heads * sum(self.parts), hidden_size),
            "linear_proj.weight": (hidden_size, self.width),
        }
        if self.conv_kernel:
            shapes["conv_weight"] = (self.conv_channels, self.conv_kernel)
            if self.conv_bias:
                shapes["conv_bias"] = (self.conv_channels,)
        if self.feature_map == "hedgehog":
            shapes |= {"map_q": (keys, self.key_dim), "map_k": (keys, self.key_dim)}
        if self.feature_map == "lrpe":
            shapes["angles"] = (self.heads, self.key_dim)
        if self.decay_rank:
            shapes["decay_in.down.weight"] = (self.decay_rank, hidden_size)
            shapes["decay_in.up.weight"] = (keys, self.decay_rank)
        if self.decay in ("sigmoid", "softplus"):
            shapes["decay.bias"] = (keys if self.decay_rank else self.heads,)
        if self.decay == "softplus":
            shapes["decay.rate_log"] = (self.heads,)
        if self.skip:
            shapes["skip"] = (self.heads,)
        if self.norm != "none" and self.norm_weight:
            shapes["norm.weight"] = (self.value_dim if self.norm == "head" else self.width,)
        if self.gate_rank:
            shapes["gate_in.down.weight"] = (self.gate_rank, hidden_size)
            shapes["gate_in.up.weight"] = (self.width, self.gate_rank)
        return shapes
