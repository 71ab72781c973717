"""What a mixer with linear attention does, step by step. Without torch."""

from dataclasses import dataclass
from typing import Literal

from .base import Shapes


@dataclass(frozen=True)
class LinearDesign:
    """What a mixer does around :func:`longspan.attention.linear_attention`, in that order.

    Exported models have these fields under the same names.
    """

    heads: int
    """Number of heads of values, each of which has a state."""
    key_heads: int
    """Number of heads of queries and keys; a divisor of ``heads``."""
    key_dim: int
    """Dims of a projected query or key."""
    value_dim: int
    conv_kernel: int = 0
    """Width of the short convolution of queries, keys and values, before SiLU; 0 for none."""
    conv_bias: bool = False
    silu: str = ""
    """Which of ``q``, ``k`` and ``v`` go through SiLU if there is no convolution."""
    rotary: bool = False
    feature_map: Literal["none", "elu", "taylor", "hedgehog", "l2", "lrpe"] = "none"
    """The feature map of queries and keys."""
    decay: Literal["none", "minimax", "paper", "retention", "sigmoid", "softplus"] = "none"
    """Fixed, or computed for each token: ``logsigmoid(x) / 16``, or ``-exp(A) softplus(x + b)``."""
    decay_rank: int = 0
    """Rank of the projection that gives every key a decay of its own; 0 for one decay per head."""
    steps: bool = False
    """Values are multiplied by the step ``softplus(x + b)`` of the decay (Mamba-2's
    discretization)."""
    beta: float = 0.0
    """The delta rule with this times a sigmoid; 0 for none."""
    normalised: bool = False
    """The weights of a query sum to one."""
    scale: float = 1.0
    skip: bool = False
    """A learned multiple of each head's values is added to its output."""
    norm: Literal["none", "head", "key_head", "all"] = "none"
    """RMSNorm of the output: of each head, of the heads of one key head together, or of all."""
    norm_weight: bool = True
    gate: Literal["none", "sigmoid", "silu", "identity"] = "none"
    """The output is multiplied by this function of a projection."""
    gate_rank: int = 0
    """Rank of that projection; 0 for a full one."""
    gate_first: bool = False
    """Gate, then norm."""

    @property
    def feature_dim(self) -> int:
        """Rows of a head's state: dims of a query's or key's features."""
        dim = self.key_dim
        if self.feature_map == "taylor":
            return 1 + dim + dim * (dim + 1) // 2
        return 2 * dim if self.feature_map in ("hedgehog", "lrpe") else dim

    @property
    def computes_decay(self) -> bool:
        """Whether each token has decays of its own."""
        return self.decay in ("sigmoid", "softplus")

    @property
    def width(self) -> int:
        """Dims of all heads' outputs together."""
        return self.heads * self.value_dim

    @property
    def group(self) -> int:
        """Number of heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of a key head in the fused projection: query, key, values; gates; betas; decays."""
        mixed = self.conv_channels // self.key_heads
        has_gates = self.gate != "none" and not self.gate_rank
        gates = self.group * self.value_dim if has_gates else 0
        betas = self.group if self.beta else 0
        has_decays = self.computes_decay and not self.decay_rank
        decays = self.group if has_decays else 0
        return mixed, gates, betas, decays

    @property
    def conv_channels(self) -> int:
        """Dims of the queries, keys and values of all heads together."""
        return self.key_heads * 2 * self.key_dim + self.width

    @property
    def state_numbers(self) -> int:
        """Count of numbers in all heads' states."""
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
        if self.computes_decay:
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
