"""A longspan model: any stack of softmax attention under sparse patterns, linear attention and
short convolutions.

Part of the model's folder: needs torch and transformers alone. Plain torch that follows the
definitions: a prompt of any length, then token by token from a cache that keeps states, and of each
head's keys those that its pattern can still see.

Positions are int ``[batch, time]`` and count real tokens from 0; padding, which comes before them,
is at -1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_longspan import LongspanConfig

State = dict[str, Tensor]
"""What a mixer keeps of the tokens so far, by its own names; every tensor has the batch first."""


class LongspanCache(Cache):
    """The states of all layers."""

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        super().__init__(layers=[])
        self.states: list[State] = [{} for _ in range(num_layers)]
        self.seen = 0
        """Tokens so far, padding included."""

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reset(self) -> None:
        self.states = [{} for _ in self.states]
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, *_) -> None:
        raise RuntimeError(
            "LongspanCache cannot be cropped: earlier states and dropped keys are not kept"
        )

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = [
            {name: function(tensor) for name, tensor in state.items()} for state in self.states
        ]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return ``x`` as fp32, or as fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def angle_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, in fp32, of the products of positions and frequencies.

    Angles are fp64: in fp32 one at position 1,048,576 is off by up to 0.06. They are made on the
    CPU for devices without fp64.
    """
    device = positions.device
    if device.type == "mps":
        positions = positions.cpu()
    angles = positions.double() * frequencies.to(positions.device).double()
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotated(x: Tensor, positions: Tensor, dim: int, theta: float) -> Tensor:
    """Rotate the first ``dim`` dims of ``x [batch, time, heads, head_dim]``, in halves."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    # [batch, time, 1, dim / 2]
    cos, sin = angle_tables(positions[..., None, None], frequencies)
    first, second = at_least_fp32(x)[..., :dim].chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., dim:]], -1)


class Rule(NamedTuple):
    """Which keys a query sees: those that fulfil all conditions.

    Key ``j`` is seen from query ``i >= j`` if ``i // block - j // block < reach``, ``j < stop``,
    and ``j // block`` (or the difference of the blocks, if ``relative``) is ``residue`` modulo
    ``step``.
    """

    block: int
    reach: int | None
    stop: int | None
    step: int
    residue: int
    relative: bool

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return which keys are seen from which queries, both as positions that broadcast."""
        query_blocks = queries // self.block
        key_blocks = keys // self.block
        visible = (queries >= keys) & (keys >= 0)
        if self.reach is not None:
            visible = visible & (query_blocks - key_blocks < self.reach)
        if self.stop is not None:
            visible = visible & (keys < self.stop)
        if self.step > 1:
            counted = query_blocks - key_blocks if self.relative else key_blocks
            visible = visible & (counted % self.step == self.residue)
        return visible

    def visible_later(self, keys: Tensor, next_query: Tensor) -> Tensor:
        """Return which keys a query at ``next_query`` or after it may see."""
        visible = keys >= 0
        if self.reach is not None:
            visible = visible & (next_query // self.block - keys // self.block < self.reach)
        if self.stop is not None:
            visible = visible & (keys < self.stop)
        if self.step > 1 and not self.relative:
            visible = visible & (keys // self.block % self.step == self.residue)
        return visible


class HeadGroup(NamedTuple):
    """KV heads that see the same keys."""

    rules: list[Rule]
    """A key is seen if any of them shows it."""
    heads: list[int]

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return which keys are seen from which queries, both as positions that broadcast."""
        mask = torch.zeros(1, dtype=torch.bool, device=keys.device)
        for rule in self.rules:
            mask = mask | rule.visible(queries, keys)
        return mask

    def kept(self, keys: Tensor, next_query: Tensor) -> Tensor:
        """Return which keys later queries may see in any sequence of the batch: ``[keys]``."""
        kept = torch.zeros_like(keys, dtype=torch.bool)
        for rule in self.rules:
            kept = kept | rule.visible_later(keys, next_query)
        return kept.any(0)


@dataclass(frozen=True)
class SoftmaxOptions:
    """What the config says of a mixer with softmax attention."""

    kind: Literal["softmax"]
    rules: list[list[list]]
    """The fields of each :class:`Rule` of each KV head."""
    rotary_dim: int
    output_gate: bool
    softcap: float | None
    qk_norm: bool | Literal["all"]
    """RMSNorm of queries and keys: of each head, or of all heads together."""
    attention_sink: bool

    def head_groups(self) -> list[HeadGroup]:
        groups: dict[str, HeadGroup] = {}
        for head, rules in enumerate(self.rules):
            group = groups.setdefault(
                repr(rules), HeadGroup([Rule(*fields) for fields in rules], [])
            )
            group.heads.append(head)
        return list(groups.values())


class SoftmaxMixer(nn.Module):
    """Attention whose pattern differs per KV head.

    The rows of the input projection are, per KV head, its queries, their gates, its key and its
    value.
    """

    QUERIES = 1024
    """Queries whose scores exist at a time."""

    def __init__(self, config: LongspanConfig, options: dict[str, Any]):
        super().__init__()
        self.options = SoftmaxOptions(**options)
        num_heads = config.num_attention_heads
        num_kv_heads = config.num_key_value_heads
        dim = config.head_dim
        self.group = num_heads // num_kv_heads
        """Query heads of one KV head."""
        self.dim = dim
        self.theta = config.rope_theta
        self.parts = [self.group, self.group if self.options.output_gate else 0, 1, 1]
        """Heads of queries, gates, keys and values in the projection, per KV head."""

        rows = num_kv_heads * sum(self.parts) * dim
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.out_proj = nn.Linear(num_heads * dim, config.hidden_size, bias=False)
        if self.options.qk_norm:
            all_heads = self.options.qk_norm == "all"
            self.q_norm = RMSNorm(num_heads * dim if all_heads else dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(num_kv_heads * dim if all_heads else dim, config.rms_norm_eps)
        has_sink = self.options.attention_sink
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if has_sink else None
        self.head_groups = self.options.head_groups()

    def forward(self, hidden: Tensor, positions: Tensor, state: State | None) -> Tensor:
        projected = self.in_proj(hidden).unflatten(-1, (-1, sum(self.parts), self.dim))
        q, gate, k, v = projected.split(self.parts, dim=-2)  # [batch, time, kv_heads, parts, dim]
        q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)  # [batch, time, heads, dim]
        q, k = self._positioned(q, k, positions)
        q = q.unflatten(2, (-1, self.group))  # [batch, time, kv_heads, group, dim]

        out = torch.empty_like(q)
        for number, group in enumerate(self.head_groups):
            keys, values, key_positions = self._with_earlier(
                number, group, k[:, :, group.heads], v[:, :, group.heads], positions, state
            )
            sinks = None
            if self.sinks is not None:
                sinks = self.sinks.view(-1, self.group)[group.heads]
            for start in range(0, q.shape[1], self.QUERIES):
                some = slice(start, start + self.QUERIES)
                mask = group.mask(positions[:, some, None], key_positions[:, None])
                queries = q[:, some, group.heads]
                out[:, some, group.heads] = self._attend(queries, keys, values, mask, sinks)

        out = out.flatten(2)  # [batch, time, heads * dim]
        if self.options.output_gate:
            out = out * torch.sigmoid(gate.flatten(2))
        return self.out_proj(out)

    def _positioned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and rotate queries and keys, if the options say so."""
        if self.options.qk_norm == "all":
            q = self.q_norm(q.flatten(2)).view_as(q)
            k = self.k_norm(k.flatten(2)).view_as(k)
        elif self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rotary_dim = self.options.rotary_dim
        if rotary_dim:
            q = rotated(q, positions, rotary_dim, self.theta)
            k = rotated(k, positions, rotary_dim, self.theta)
        return q, k

    @staticmethod
    def _with_earlier(
        number: int,
        group: HeadGroup,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        state: State | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the keys of the cache before the new ones, and keep there what later queries may see.

        Args:
            number: which of the head groups it is.
            keys: of the group's heads, ``[batch, time, heads, dim]``, like the values.

        Returns:
            Keys, values and the positions of both.
        """
        if state is None:
            return keys, values, positions
        next_query = positions[:, -1:] + 1
        if f"k{number}" in state:
            keys = torch.cat([state[f"k{number}"], keys], 1)
            values = torch.cat([state[f"v{number}"], values], 1)
            positions = torch.cat([state[f"at{number}"], positions], 1)
        kept = group.kept(positions, next_query)
        state[f"k{number}"] = keys[:, kept]
        state[f"v{number}"] = values[:, kept]
        state[f"at{number}"] = positions[:, kept]
        return keys, values, positions

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """Attend to the keys that ``mask [batch, time, keys]`` shows; queries that see none give 0.

        ``q`` is ``[batch, time, kv_heads, group, dim]``.
        """
        scores = torch.einsum("bthgd,bshd->bhgts", q, k) * self.dim**-0.5
        scores = at_least_fp32(scores)  # [batch, kv_heads, group, time, keys]
        if self.options.softcap:
            scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        largest = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        if sinks is None:
            weights = (scores - largest).exp()
            total = weights.sum(-1, keepdim=True)
        else:
            sink_scores = sinks[None, :, :, None, None].to(scores.dtype)
            largest = torch.maximum(largest, sink_scores)
            weights = (scores - largest).exp()
            total = weights.sum(-1, keepdim=True) + (sink_scores - largest).exp()
        weights = weights / total.clamp(min=1e-30)
        return torch.einsum("bhgts,bshd->bthgd", weights.to(v.dtype), v)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, state: State | None) -> Tensor:
    """Convolve each channel causally, and keep the last inputs for the next call.

    ``x`` is ``[batch, time, channels]``, ``weight`` is ``[channels, width]``.
    """
    width = weight.shape[1]
    earlier = x.new_zeros(len(x), width - 1, x.shape[2])
    if state is not None:
        earlier = state.get("inputs", earlier)
    padded = torch.cat([earlier, x], 1)
    if state is not None:
        state["inputs"] = padded[:, padded.shape[1] - (width - 1) :]
    out = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=len(weight))
    return out.transpose(1, 2)


@dataclass(frozen=True)
class LinearOptions:
    """What the config says of a mixer with linear attention, in the order in which it does it."""

    kind: Literal["linear"]
    heads: int
    """Heads of values, and so of states."""
    key_heads: int
    """Heads of queries and keys, which groups of value heads share."""
    key_dim: int
    value_dim: int
    conv_kernel: int
    """Width of the short convolution of queries, keys and values, then SiLU; 0 for none."""
    conv_bias: bool
    silu: str
    """Which of ``q``, ``k`` and ``v`` go through SiLU if there is no convolution."""
    rotary: bool
    feature_map: str
    """Of queries and keys: see :meth:`LinearMixer._features`."""
    decay: str
    decay_rank: int
    """Rank of the projection that gives every key dim a decay of its own; 0 for one per head."""
    steps: bool
    """Whether values are multiplied by the step of the decay."""
    beta: float
    """Factor of the delta rule; 0 for none."""
    normalised: bool
    """Whether the weights of a token's values add up to one."""
    scale: float
    skip: bool
    """Whether a learned multiple of each head's values is added to its output."""
    norm: str
    """RMSNorm of the output: ``none``, each ``head``, the heads of a ``key_head``, or ``all``."""
    norm_weight: bool
    gate: str
    """Function of the output's gate, or ``none``."""
    gate_rank: int
    """Rank of the gate's projection; 0 for a full one."""
    gate_first: bool
    """Whether the gate comes before the norm."""
    log_decay: list[float] | None
    """The fixed decay of each head, in natural log; None if the tokens decide, or without decay."""

    @property
    def group(self) -> int:
        """Value heads of one key head."""
        return self.heads // self.key_heads

    @property
    def width(self) -> int:
        """Channels of all heads' outputs."""
        return self.heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.width

    @property
    def learned_decay(self) -> bool:
        return self.decay in ("sigmoid", "softplus")

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Rows of one key head in the input projection: its query, key and values together; their
        gates, betas and decays.
        """
        qkv = self.conv_channels // self.key_heads
        gates = self.group * self.value_dim if self.gate != "none" and not self.gate_rank else 0
        betas = self.group if self.beta else 0
        decays = self.group if self.learned_decay and not self.decay_rank else 0
        return qkv, gates, betas, decays


_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "identity": lambda x: x,
}


class LinearMixer(nn.Module):
    """Linear attention of every kind: the options say which steps it has."""

    def __init__(self, config: LongspanConfig, options: dict[str, Any]):
        super().__init__()
        self.options = LinearOptions(**options)
        self.theta = config.rope_theta
        self.eps = config.rms_norm_eps
        self._add_parameters(config.hidden_size)

    def _add_parameters(self, hidden: int) -> None:
        options = self.options
        key_width = options.heads * options.key_dim
        self.in_proj = nn.Linear(hidden, options.key_heads * sum(options.parts), bias=False)
        self.out_proj = nn.Linear(options.width, hidden, bias=False)
        if options.conv_kernel:
            channels = options.conv_channels
            self.conv_weight = nn.Parameter(torch.zeros(channels, options.conv_kernel))
            self.conv_bias = nn.Parameter(torch.zeros(channels)) if options.conv_bias else None
        if options.feature_map == "hedgehog":
            self.map_q = nn.Parameter(torch.zeros(key_width, options.key_dim))
            self.map_k = nn.Parameter(torch.zeros(key_width, options.key_dim))
        if options.feature_map == "lrpe":
            self.angles = nn.Parameter(torch.zeros(options.heads, options.key_dim))
        if options.decay_rank:
            self.decay_down = nn.Linear(hidden, options.decay_rank, bias=False)
            self.decay_up = nn.Linear(options.decay_rank, key_width, bias=False)
        if options.learned_decay:
            num_decays = key_width if options.decay_rank else options.heads
            self.decay_bias = nn.Parameter(torch.zeros(num_decays))
        if options.decay == "softplus":
            self.rate_log = nn.Parameter(torch.zeros(options.heads))
        if options.skip:
            self.skip = nn.Parameter(torch.ones(options.heads))
        if options.gate_rank:
            self.gate_down = nn.Linear(hidden, options.gate_rank, bias=False)
            self.gate_up = nn.Linear(options.gate_rank, options.width, bias=False)
        if options.norm != "none" and options.norm_weight:
            size = options.value_dim if options.norm == "head" else options.width
            self.norm_weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor, positions: Tensor, state: State | None) -> Tensor:
        options = self.options
        is_token = positions >= 0  # [batch, time]
        projected = self.in_proj(hidden).unflatten(-1, (options.key_heads, -1))
        qkv, gate, beta, decay = projected.split(options.parts, dim=-1)
        gate, beta, decay = gate.flatten(2), beta.flatten(2), decay.flatten(2)

        q, k, v = self._queries_keys_values(qkv, is_token, state)
        q = self._features(q, "q", positions)
        k = self._features(k, "k", positions)
        k = k * is_token[..., None, None]  # padding leaves nothing in the state

        log_decay, step = self._decays(hidden, decay)
        values = v * step[..., None].to(v.dtype) if options.steps and step is not None else v
        if options.normalised:
            values = F.pad(values, (0, 1), value=1.0)  # whose output is the sum of the weights
        out, last_state = recurrence(
            q.repeat_interleave(options.group, 2),
            k.repeat_interleave(options.group, 2),
            values,
            log_decay,
            options.beta * torch.sigmoid(beta) if options.beta else None,
            options.scale,
            None if state is None else state.get("state"),
        )
        if state is not None:
            state["state"] = last_state
        out = out.to(v.dtype)  # [batch, time, heads, value_dim, and the sum if normalised]

        if options.normalised:
            out = out[..., :-1] / (out[..., -1:] + 1e-6)
        if options.skip:
            out = out + v * self.skip[:, None].to(v.dtype)
        if options.gate_rank:
            gate = self.gate_up(self.gate_down(hidden))
        return self.out_proj(self._gated_norm(out, gate))

    def _queries_keys_values(
        self, qkv: Tensor, is_token: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve, and split ``[batch, time, key_heads, rows]``.

        Returns:
            Queries and keys ``[batch, time, key_heads, key_dim]``, values ``[batch, time, heads,
            value_dim]``.
        """
        options = self.options
        if options.conv_kernel:
            channels = qkv.flatten(2) * is_token[..., None]
            convolution = convolved(channels, self.conv_weight, self.conv_bias, state)
            qkv = F.silu(convolution).view_as(qkv)
        dims = [options.key_dim, options.key_dim, options.group * options.value_dim]
        q, k, v = qkv.split(dims, dim=-1)
        if not options.conv_kernel:
            q = F.silu(q) if "q" in options.silu else q
            k = F.silu(k) if "k" in options.silu else k
            v = F.silu(v) if "v" in options.silu else v
        return q, k, v.unflatten(-1, (options.group, -1)).flatten(2, 3)

    def _features(self, x: Tensor, which: Literal["q", "k"], positions: Tensor) -> Tensor:
        """Return the features of queries or keys, ``[batch, time, key_heads, features]``."""
        dim = self.options.key_dim
        feature_map = self.options.feature_map
        if self.options.rotary:
            x = rotated(x, positions, dim, self.theta)
        if feature_map == "elu":
            return F.elu(x) + 1
        if feature_map == "l2":
            wide = at_least_fp32(x)
            length = wide.square().sum(-1, keepdim=True)
            return (wide * torch.rsqrt(length + 1e-6)).to(x.dtype)
        if feature_map == "taylor":
            # Products of two tokens' features are 1 + s + s^2 / 2 of their scaled product s.
            x = x * dim**-0.25
            first, second = torch.triu_indices(dim, dim, device=x.device)
            weights = torch.where(first == second, 0.5**0.5, 1.0).to(x.dtype)
            squares = x[..., first] * x[..., second] * weights
            return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)
        if feature_map == "hedgehog":
            weight = (self.map_q if which == "q" else self.map_k).view(-1, dim, dim)
            x = 2 * torch.einsum("...hd,hed->...he", x, weight)
            both_signs = torch.cat([x, -x], -1)
            return at_least_fp32(both_signs).softmax(-1).to(x.dtype)
        if feature_map == "lrpe":
            # The angle between two tokens is that of their distance.
            tables = angle_tables(positions[..., None, None], self.angles)
            return x.repeat(1, 1, 1, 2) * torch.cat(tables, -1).to(x.dtype)
        return x

    def _decays(self, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return log-decays ``[batch or 1, time or 1, heads, dims or 1]``, and the steps ``[batch,
        time, heads]`` of those that have any.
        """
        options = self.options
        if options.decay == "none":
            return hidden.new_zeros(1, 1, options.heads, 1, dtype=torch.float32), None
        if options.log_decay:
            fixed = torch.tensor(options.log_decay, dtype=torch.float32, device=hidden.device)
            return fixed.view(1, 1, -1, 1), None
        if options.decay_rank:
            x = self.decay_up(self.decay_down(hidden))
        x = (x.float() + self.decay_bias.float()).unflatten(2, (options.heads, -1))
        if options.decay == "sigmoid":
            return F.logsigmoid(x) / 16, None
        step = F.softplus(x)  # [batch, time, heads, dims or 1]
        return -step * self.rate_log.float().exp()[:, None], step[..., 0]

    def _gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        """Gate and norm ``[batch, time, heads, value_dim]`` to ``[batch, time, width]``."""
        if self.options.gate == "none":
            return self._normed(out)
        gate = _GATES[self.options.gate](gate)
        if self.options.gate_first:
            return self._normed(out * gate.view_as(out))
        return self._normed(out) * gate

    def _normed(self, out: Tensor) -> Tensor:
        norm = self.options.norm
        if norm == "none":
            return out.flatten(2)
        weight = self.norm_weight if self.options.norm_weight else None
        if norm == "head":
            return F.rms_norm(out, out.shape[-1:], weight, self.eps).flatten(2)
        num_groups = 1 if norm == "all" else self.options.key_heads
        grouped = out.flatten(2).unflatten(2, (num_groups, -1))
        out = F.rms_norm(grouped, grouped.shape[-1:], None, self.eps).flatten(2)
        return out if weight is None else out * weight


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``S_t = e^log_decay_t S_(t-1) + k_t u_t`` and ``out_t = scale q_t S_t`` in chunks.

    ``u`` is ``v``, or by the delta rule ``beta_t (v_t - k_t e^log_decay_t S_(t-1))``.

    Args:
        q: ``[batch, time, heads, dim]``, like the keys, the values and the log-decays.
        beta: ``[batch, time, heads]`` for the delta rule, or None.
        state: that after the last token, ``[batch, heads, key dim, value dim]``; None for zeros.

    Returns:
        The outputs, and the state after the last token, in fp32 or fp64.
    """
    wide = torch.promote_types(torch.float32, q.dtype)
    batch, time, heads, dim = q.shape
    chunk = 64 if log_decay.shape[-1] == 1 else 16
    if state is None:
        state = q.new_zeros(batch, heads, dim, v.shape[-1], dtype=wide)
    state = state.to(wide)
    log_decay = log_decay.to(wide).expand(batch, time, heads, -1)

    outputs = []
    for start in range(0, time, chunk):
        tokens = slice(start, start + chunk)
        # [batch, heads, chunk, dim]
        q_chunk = q[:, tokens].transpose(1, 2).to(wide)
        k_chunk = k[:, tokens].transpose(1, 2).to(wide)
        v_chunk = v[:, tokens].transpose(1, 2).to(wide)
        total = log_decay[:, tokens].transpose(1, 2).to(wide).cumsum(2)  # since the chunk began
        between = _decay_between(total)
        if beta is not None:
            # What the keys recall of the state and of one another is subtracted from the values.
            rates = beta[:, tokens].transpose(1, 2)[..., None].to(wide)
            recalled = (rates * _decayed_products(k_chunk, k_chunk, between)).tril(-1)
            v_chunk = rates * (v_chunk - (k_chunk * total.exp()) @ state)
            v_chunk = torch.linalg.solve_triangular(
                recalled, v_chunk, upper=False, unitriangular=True
            )
        weights = _decayed_products(q_chunk, k_chunk, between)
        outputs.append((q_chunk * total.exp()) @ state + weights @ v_chunk)
        last = total[:, :, -1:]
        state = last.exp().mT * state + (k_chunk * (last - total).exp()).mT @ v_chunk
    return scale * torch.cat(outputs, 2).transpose(1, 2), state


def _decay_between(total: Tensor) -> Tensor:
    """Return the decay from every token of a chunk to every other: 0 to those before it.

    ``total`` is the log-decay summed from the chunk's start, ``[batch, heads, chunk, dims or 1]``;
    the result is ``[batch, heads, chunk, chunk, dims or 1]``.
    """
    distance = total[:, :, :, None] - total[:, :, None]
    causal = torch.ones(distance.shape[2:4], dtype=torch.bool, device=total.device).tril()
    return torch.where(causal[:, :, None], distance, -torch.inf).exp()


def _decayed_products(x: Tensor, k: Tensor, between: Tensor) -> Tensor:
    """Return the products of ``x`` with the keys up to it, decayed in between: ``[batch, heads,
    chunk, chunk]``.
    """
    if between.shape[-1] == 1:
        return (x @ k.mT) * between[..., 0]
    return torch.einsum("bhik,bhijk,bhjk->bhij", x, between, k)


class ConvolutionMixer(nn.Module):
    """``c * conv(b * x)``; per head the projection's rows are ``b``, ``c`` and ``x``."""

    def __init__(self, config: LongspanConfig, options: dict[str, Any]):
        super().__init__()
        self.num_heads = config.num_attention_heads
        width = config.num_attention_heads * config.head_dim
        self.in_proj = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.conv_weight = nn.Parameter(torch.zeros(width, options["conv_kernel"]))

    def forward(self, hidden: Tensor, positions: Tensor, state: State | None) -> Tensor:
        projected = self.in_proj(hidden).unflatten(-1, (self.num_heads, -1))
        b, c, x = (part.flatten(2) for part in projected.chunk(3, -1))  # [batch, time, width]
        is_token = (positions >= 0)[..., None]
        return self.out_proj(c * convolved(b * x * is_token, self.conv_weight, None, state))


MIXERS: dict[str, type[nn.Module]] = {
    "softmax": SoftmaxMixer,
    "linear": LinearMixer,
    "convolution": ConvolutionMixer,
}
"""The class of each ``kind`` of mixer: ``Mixer(config, options)``, where ``options`` is the mixer's
section of the config, with ``forward(hidden, positions, state)``."""


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int, activation: str = "silu"):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = F.silu if activation == "silu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.activation(gate) * up)


class Experts(nn.Module):
    """A mixture of MLPs, and one that all tokens go through if the config has its size."""

    def __init__(self, hidden: int, moe: dict[str, Any], activation: str):
        super().__init__()
        self.top_k = moe["num_experts_per_tok"]
        self.norm_topk_prob = moe["norm_topk_prob"]
        self.router = nn.Linear(hidden, moe["num_experts"], bias=False)
        self.experts = nn.ModuleList(
            MLP(hidden, moe["intermediate_size"], activation) for _ in range(moe["num_experts"])
        )
        shared_size = moe["shared_expert_intermediate_size"]
        has_gate = shared_size and moe["shared_expert_gate"]
        self.shared = MLP(hidden, shared_size, activation) if shared_size else None
        self.shared_gate = nn.Linear(hidden, 1, bias=False) if has_gate else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [tokens, hidden]
        weights, chosen = self._route(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            out[token] += expert(tokens[token]) * weights[token, choice, None].to(tokens.dtype)
        if self.shared is not None:
            shared = self.shared(tokens)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(tokens)) * shared
            out = out + shared
        return out.view_as(x)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and the numbers of each token's experts: ``[tokens, top_k]``."""
        scores = F.linear(tokens.float(), self.router.weight.float())
        if self.norm_topk_prob:
            weights, chosen = scores.topk(self.top_k)
            return weights.softmax(-1), chosen
        weights, chosen = scores.softmax(-1).topk(self.top_k)
        return weights, chosen


class LongspanLayer(nn.Module):
    """A mixer and an MLP, each with its norms and its way of joining the residual stream."""

    def __init__(self, config: LongspanConfig, layer: dict[str, Any]):
        super().__init__()
        self.norm = layer["norm"]
        self.mixer_residual = layer["mixer_residual"]
        self.mlp_residual = layer["mlp_residual"]
        self.mixer = MIXERS[layer["mixer"]["kind"]](config, layer["mixer"])
        self.mlp = _mlp(config, layer)

        def new_norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        has_norms_before = self.norm != "reordered"
        has_norms_after = self.norm in ("sandwich", "reordered")
        self.input_norm = new_norm() if has_norms_before else None
        self.mlp_norm = new_norm() if has_norms_before else None
        self.mixer_output_norm = new_norm() if has_norms_after else None
        self.mlp_output_norm = new_norm() if has_norms_after else None

    def forward(self, x: Tensor, positions: Tensor, state: State | None) -> Tensor:
        normed = x if self.input_norm is None else self.input_norm(x)
        mixed = self.mixer(normed, positions, state)
        x = self._joined(x, normed, mixed, self.mixer_output_norm, self.mixer_residual)

        normed = x if self.mlp_norm is None else self.mlp_norm(x)
        return self._joined(x, normed, self.mlp(normed), self.mlp_output_norm, self.mlp_residual)

    def _joined(
        self,
        x: Tensor,
        normed: Tensor,
        out: Tensor,
        output_norm: RMSNorm | None,
        scales: list[float],
    ) -> Tensor:
        """Add half a layer's output to its input ``x``, or to what the norm made of it."""
        if output_norm is not None:
            out = output_norm(out)
        residual = normed if self.norm == "post" else x
        return scales[0] * residual + scales[1] * out


def _mlp(config: LongspanConfig, layer: dict[str, Any]) -> MLP | Experts:
    activation = layer["mlp_activation"]
    if layer["mlp"] == "moe":
        assert config.moe is not None
        return Experts(config.hidden_size, config.moe, activation)
    return MLP(config.hidden_size, config.intermediate_size, activation)


class LongspanPreTrainedModel(PreTrainedModel):
    config_class = LongspanConfig
    base_model_prefix = "model"
    _no_split_modules = ["LongspanLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Rounded to bf16, a decay rate would be up to 0.8 % off, and a state's half-life with it.
    _keep_in_fp32_modules_strict = ["rate_log"]
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class LongspanModel(LongspanPreTrainedModel):
    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LongspanLayer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongspanCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of new tokens.

        ``attention_mask [batch, all tokens so far]`` marks real tokens; padding must come before
        them.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        if use_cache and cache is None:
            cache = LongspanCache(len(self.layers))

        positions = _positions(x, attention_mask, 0 if cache is None else cache.seen)
        if position_ids is not None and (position_ids != positions)[positions >= 0].any():
            raise ValueError(
                "position_ids must count from 0 at the first token that attention_mask marks; "
                "leave position_ids out"
            )
        states: Sequence[State | None] = [None] * len(self.layers)
        if cache is not None:
            states = cache.states
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, positions, state)
        if cache is not None:
            cache.seen += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


def _positions(x: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
    """Return the positions of the new tokens ``x``, after ``seen`` others: ``[batch, time]``."""
    batch, time = x.shape[:2]
    if attention_mask is None:
        return torch.arange(seen, seen + time, device=x.device).expand(batch, -1)
    if attention_mask.shape != (batch, seen + time):
        raise ValueError(
            f"attention_mask has the shape {list(attention_mask.shape)}, but must have "
            f"{[batch, seen + time]}: it covers all tokens so far"
        )
    is_token = attention_mask.bool()
    if (is_token[:, :-1] & ~is_token[:, 1:]).any():
        raise ValueError(
            "attention_mask: padding must come before the tokens (padding_side='left')"
        )
    return (is_token.long().cumsum(1) - 1)[:, seen:]


class LongspanForCausalLM(LongspanPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        self.model = LongspanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongspanCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )
