"""A longspan model: any stack of softmax attention under sparse patterns, linear attention and short convolutions.

Part of the model's folder: needs torch and transformers alone. Plain torch that follows the definitions: a prompt of any
length, then token by token from a cache that keeps states, and of each head's keys those that its pattern can still see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_longspan import LongspanConfig


class LongspanCache(Cache):
    """Of each layer the tensors that its mixer keeps, batch first; ``seen`` tokens so far, padding included."""

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        super().__init__(layers=[])
        self.states: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
        self.seen = 0

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reset(self) -> None:
        self.states, self.seen = [{} for _ in self.states], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, *_) -> None:
        raise RuntimeError(
            "LongspanCache cannot forget its last tokens: states and pruned keys do not come back"
        )

    def _each(self, change) -> None:
        self.states = [
            {name: change(tensor) for name, tensor in state.items()} for state in self.states
        ]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotated(x: Tensor, positions: Tensor, dim: int, theta: float) -> Tensor:
    """The first ``dim`` dims of ``x [batch, time, heads, head_dim]``, in halves, by ``positions [batch, time]``."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
    angles = (positions[..., None].float() * frequencies)[:, :, None]
    wide = x.float() if x.dtype != torch.float64 else x
    first, second = wide[..., :dim].chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., dim:]], -1)


class SoftmaxMixer(nn.Module):
    """Attention whose pattern differs per KV head: ``rules`` of each, a key is seen where one of them holds.

    A rule is ``(block, reach, stop, step, residue, relative)``: key ``j`` is seen from query ``i >= j`` where
    ``i // block - j // block < reach``, ``j < stop``, and ``j // block`` (or the difference, where relative) is ``residue``
    modulo ``step``. The projection's rows are, per KV head, its queries, their gates, its key and its value.
    """

    QUERIES = 1024  # whose scores exist at a time

    def __init__(self, config: LongspanConfig, options: dict):
        super().__init__()
        heads, kv_heads, dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.group, self.dim, self.theta = heads // kv_heads, dim, config.rope_theta
        self.rotary_dim, self.gated, self.softcap = (
            options["rotary_dim"],
            options["output_gate"],
            options["softcap"],
        )
        self.parts = [self.group, self.group if self.gated else 0, 1, 1]
        self.in_proj = nn.Linear(config.hidden_size, kv_heads * sum(self.parts) * dim, bias=False)
        self.out_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.qk_norm = options["qk_norm"]
        if self.qk_norm:
            sizes = (heads * dim, kv_heads * dim) if self.qk_norm == "all" else (dim, dim)
            self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) for size in sizes)
        self.sinks = nn.Parameter(torch.zeros(heads)) if options["attention_sink"] else None
        together: dict[str, list[int]] = {}
        for head, rules in enumerate(options["rules"]):
            together.setdefault(repr(rules), []).append(head)
        self.alike = [(options["rules"][alike[0]], alike) for alike in together.values()]
        """Rules, and the KV heads that have them."""

    def forward(self, hidden: Tensor, positions: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        rows = self.in_proj(hidden).unflatten(-1, (-1, sum(self.parts), self.dim))
        q, gate, k, v = rows.split(self.parts, dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
        if self.qk_norm == "all":
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        elif self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_dim:
            q, k = (rotated(x, positions, self.rotary_dim, self.theta) for x in (q, k))
        q = q.unflatten(2, (-1, self.group))
        out = torch.empty_like(q[..., : self.dim])
        for number, (rules, heads) in enumerate(self.alike):
            keys, values, at = k[:, :, heads], v[:, :, heads], positions
            if state is not None:
                if f"k{number}" in state:
                    before = (state[f"{name}{number}"] for name in ("k", "v", "at"))
                    keys, values, at = (
                        torch.cat(pair, 1) for pair in zip(before, (keys, values, at), strict=True)
                    )
                kept = self._kept(rules, at, positions[:, -1:] + 1)
                state[f"k{number}"], state[f"v{number}"], state[f"at{number}"] = (
                    keys[:, kept],
                    values[:, kept],
                    at[:, kept],
                )
            sinks = self.sinks.view(-1, self.group)[heads] if self.sinks is not None else None
            for start in range(0, q.shape[1], self.QUERIES):
                part = slice(start, start + self.QUERIES)
                mask = self._mask(rules, positions[:, part, None], at[:, None])
                out[:, part, heads] = self._attend(q[:, part, heads], keys, values, mask, sinks)
        out = out.flatten(2)
        return self.out_proj(out * torch.sigmoid(gate.flatten(2)) if self.gated else out)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """``q [batch, time, kv heads, group, dim]``, ``mask [batch, time, keys]``; rows that see nothing give 0."""
        scores = torch.einsum("bthgd,bshd->bhgts", q, k) * self.dim**-0.5
        scores = scores.float() if scores.dtype != torch.float64 else scores
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        most = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        if sinks is not None:
            extra = sinks[None, :, :, None, None].to(scores.dtype)
            most = torch.maximum(most, extra)
        weights = (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (extra - most).exp()
        weights = weights / total.clamp(min=1e-30)
        return torch.einsum("bhgts,bshd->bthgd", weights.to(v.dtype), v)

    @staticmethod
    def _mask(rules: list, queries: Tensor, keys: Tensor) -> Tensor:
        shown = torch.zeros(1, dtype=torch.bool, device=keys.device)
        for block, reach, stop, step, residue, relative in rules:
            near, far = queries // block, keys // block
            seen = (queries >= keys) & (keys >= 0)  # padding stands at -1
            if reach is not None:
                seen = seen & (near - far < reach)
            if stop is not None:
                seen = seen & (keys < stop)
            if step > 1:
                seen = seen & ((near - far if relative else far) % step == residue)
            shown = shown | seen
        return shown

    @staticmethod
    def _kept(rules: list, keys: Tensor, after: Tensor) -> Tensor:
        """Which keys a query at ``after`` or later sees, in any row of the batch: ``[keys]``."""
        alive = torch.zeros_like(keys, dtype=torch.bool)
        for block, reach, stop, step, residue, relative in rules:
            seen = keys >= 0
            if reach is not None:
                seen = seen & (after // block - keys // block < reach)
            if stop is not None:
                seen = seen & (keys < stop)
            if step > 1 and not relative:
                seen = seen & (keys // block % step == residue)
            alive = alive | seen
        return alive.any(0)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor] | None
) -> Tensor:
    """Causal, by channel: ``x [batch, time, channels]``, ``weight [channels, width]``; keeps the last inputs."""
    width = weight.shape[1]
    before = x.new_zeros(len(x), width - 1, x.shape[2])
    if state is not None:
        before = state.get("inputs", before)
    padded = torch.cat([before, x], 1)
    if state is not None:
        state["inputs"] = padded[:, padded.shape[1] - (width - 1) :]
    return F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=len(weight)).transpose(
        1, 2
    )


class LinearMixer(nn.Module):
    """Linear attention of every kind; ``options`` says which steps it has. Per key head the projection's rows are its query,
    key and values, and if there are any gates, betas and decays of its values.
    """

    def __init__(self, config: LongspanConfig, options: dict):
        super().__init__()
        self.options = options
        heads, key_heads, dim, value_dim = (
            options[key] for key in ("heads", "key_heads", "key_dim", "value_dim")
        )
        self.heads, self.key_heads, self.dim, self.group = heads, key_heads, dim, heads // key_heads
        self.theta, self.eps, hidden, width = (
            config.rope_theta,
            config.rms_norm_eps,
            config.hidden_size,
            heads * value_dim,
        )
        self.value_dim, channels = value_dim, 2 * key_heads * dim + width
        gates = (
            self.group * value_dim if options["gate"] != "none" and not options["gate_rank"] else 0
        )
        learned = options["decay"] in ("sigmoid", "softplus")
        decays = self.group if learned and not options["decay_rank"] else 0
        self.parts = [channels // key_heads, gates, self.group if options["beta"] else 0, decays]
        self.in_proj = nn.Linear(hidden, key_heads * sum(self.parts), bias=False)
        self.out_proj = nn.Linear(width, hidden, bias=False)
        if options["conv_kernel"]:
            self.conv_weight = nn.Parameter(torch.zeros(channels, options["conv_kernel"]))
            self.conv_bias = nn.Parameter(torch.zeros(channels)) if options["conv_bias"] else None
        if options["feature_map"] == "hedgehog":
            self.map_q, self.map_k = (nn.Parameter(torch.zeros(heads * dim, dim)) for _ in "qk")
        if options["feature_map"] == "lrpe":
            self.angles = nn.Parameter(torch.zeros(heads, dim))
        if options["decay_rank"]:
            self.decay_down = nn.Linear(hidden, options["decay_rank"], bias=False)
            self.decay_up = nn.Linear(options["decay_rank"], heads * dim, bias=False)
        if learned:
            self.decay_bias = nn.Parameter(
                torch.zeros(heads * (dim if options["decay_rank"] else 1))
            )
        if options["decay"] == "softplus":
            self.rate_log = nn.Parameter(torch.zeros(heads))
        if options["skip"]:
            self.skip = nn.Parameter(torch.ones(heads))
        if options["gate_rank"]:
            self.gate_down = nn.Linear(hidden, options["gate_rank"], bias=False)
            self.gate_up = nn.Linear(options["gate_rank"], width, bias=False)
        if options["norm"] != "none" and options["norm_weight"]:
            self.norm_weight = nn.Parameter(
                torch.ones(value_dim if options["norm"] == "head" else width)
            )

    def forward(self, hidden: Tensor, positions: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        options, real = self.options, positions >= 0
        rows = self.in_proj(hidden).unflatten(-1, (self.key_heads, -1))
        mixed, gate, beta, decay = rows.split(self.parts, dim=-1)
        gate, beta, decay = gate.flatten(2), beta.flatten(2), decay.flatten(2)
        if options["conv_kernel"]:
            flat = mixed.flatten(2) * real[..., None]
            mixed = F.silu(convolved(flat, self.conv_weight, self.conv_bias, state)).view_as(mixed)
        q, k, v = mixed.split([self.dim, self.dim, self.group * self.value_dim], dim=-1)
        if not options["conv_kernel"]:
            q, k, v = (
                F.silu(x) if name in options["silu"] else x
                for name, x in zip("qkv", (q, k, v), strict=True)
            )
        v = v.unflatten(-1, (self.group, -1)).flatten(2, 3)
        q, k = self._features(q, "q", positions), self._features(k, "k", positions)
        k = k * real[..., None, None]

        log, step = self._decays(hidden, decay)
        values = v * step[..., None].to(v.dtype) if options["steps"] else v
        if options["normalised"]:
            values = F.pad(values, (0, 1), value=1.0)
        if options["beta"]:
            beta = options["beta"] * torch.sigmoid(beta)
        q, k = (x.repeat_interleave(self.group, 2) for x in (q, k))
        before = state.get("state") if state is not None else None
        out, last = recurrence(
            q, k, values, log, beta if options["beta"] else None, options["scale"], before
        )
        if state is not None:
            state["state"] = last
        out = out.to(v.dtype)
        if options["normalised"]:
            out = out[..., :-1] / (out[..., -1:] + 1e-6)
        if options["skip"]:
            out = out + v * self.skip[:, None].to(v.dtype)
        if options["gate_rank"]:
            gate = self.gate_up(self.gate_down(hidden))
        return self.out_proj(self._gated_norm(out, gate))

    def _features(self, x: Tensor, which: str, positions: Tensor) -> Tensor:
        options, name = self.options, self.options["feature_map"]
        if options["rotary"]:
            x = rotated(x, positions, self.dim, self.theta)
        if name == "elu":
            return F.elu(x) + 1
        if name == "l2":
            wide = x.float() if x.dtype != torch.float64 else x
            return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
        if name == "taylor":  # products are 1 + s + s^2 / 2
            x = x * self.dim**-0.25
            first, second = torch.triu_indices(self.dim, self.dim, device=x.device)
            weights = torch.where(first == second, 0.5**0.5, 1.0).to(x.dtype)
            return torch.cat(
                [torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * weights], -1
            )
        if name == "hedgehog":
            weight = (self.map_q if which == "q" else self.map_k).view(-1, self.dim, self.dim)
            x = 2 * torch.einsum("...hd,hed->...he", x, weight)
            both = torch.cat([x, -x], -1)
            return (both.float() if both.dtype != torch.float64 else both).softmax(-1).to(x.dtype)
        if name == "lrpe":
            angles = positions[..., None, None] * self.angles.float()
            return x.repeat(1, 1, 1, 2) * torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        return x

    def _decays(self, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-decays ``[batch or 1, time or 1, heads, dims or 1]``, and the steps of those that have any."""
        options = self.options
        if options["decay"] == "none":
            return hidden.new_zeros(1, 1, self.heads, 1, dtype=torch.float32), None
        if options["log_decay"]:
            return torch.tensor(
                options["log_decay"], dtype=torch.float32, device=hidden.device
            ).view(1, 1, -1, 1), None
        if options["decay_rank"]:
            x = self.decay_up(self.decay_down(hidden))
        x = (x.float() + self.decay_bias.float()).unflatten(2, (self.heads, -1))
        if options["decay"] == "sigmoid":
            return F.logsigmoid(x) / 16, None
        step = F.softplus(x)
        return -step * self.rate_log.float().exp()[:, None], step[..., 0]

    def _gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        options = self.options
        gates = {"none": None, "sigmoid": torch.sigmoid, "silu": F.silu, "identity": lambda x: x}[
            options["gate"]
        ]
        if gates and options["gate_first"]:
            out = out * gates(gate).view_as(out)
        if options["norm"] == "head":
            weight = self.norm_weight if options["norm_weight"] else None
            out = F.rms_norm(out, out.shape[-1:], weight, self.eps).flatten(2)
        elif options["norm"] != "none":
            rows = out.flatten(2).unflatten(
                2, (1 if options["norm"] == "all" else self.key_heads, -1)
            )
            out = F.rms_norm(rows, rows.shape[-1:], None, self.eps).flatten(2)
            out = out * self.norm_weight if options["norm_weight"] else out
        else:
            out = out.flatten(2)
        return out * gates(gate) if gates and not options["gate_first"] else out


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    beta: Tensor | None,
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S_t = e^log_t S_(t-1) + k_t u_t``, ``out_t = scale q_t S_t``: ``u`` is ``v``, or by the delta rule
    ``beta_t (v_t - k_t e^log_t S_(t-1))``. In chunks; ``[batch, time, heads, dims]``, the state ``[batch, heads, dims, dims]``.
    """
    wide = torch.promote_types(torch.float32, q.dtype)
    batch, time, heads, dim = q.shape
    chunk = 64 if log.shape[-1] == 1 else 16
    state = (
        q.new_zeros(batch, heads, dim, v.shape[-1], dtype=wide) if state is None else state.to(wide)
    )
    log = log.to(wide).expand(batch, time, heads, -1)
    found = []
    for start in range(0, time, chunk):
        part = slice(start, start + chunk)
        qc, kc, vc, gc = (x[:, part].transpose(1, 2).to(wide) for x in (q, k, v, log))
        gc = gc.cumsum(2)
        away = gc[:, :, :, None] - gc[:, :, None]
        lower = torch.ones(away.shape[2:4], dtype=torch.bool, device=q.device).tril()[:, :, None]
        between = torch.where(lower, away, -torch.inf).exp()

        def products(x: Tensor, k: Tensor = kc, between: Tensor = between) -> Tensor:
            """Of ``x`` with the keys up to it, decayed in between."""
            if between.shape[-1] == 1:
                return (x @ k.mT) * between[..., 0]
            return torch.einsum("bhik,bhijk,bhjk->bhij", x, between, k)

        if beta is not None:
            rates = beta[:, part].transpose(1, 2)[..., None].to(wide)
            among = (rates * products(kc)).tril(-1)
            vc = rates * (vc - (kc * gc.exp()) @ state)
            vc = torch.linalg.solve_triangular(among, vc, upper=False, unitriangular=True)
        found.append((qc * gc.exp()) @ state + products(qc) @ vc)
        last = gc[:, :, -1:]
        state = last.exp().mT * state + (kc * (last - gc).exp()).mT @ vc
    return scale * torch.cat(found, 2).transpose(1, 2), state


class ConvolutionMixer(nn.Module):
    """``c * conv(b * x)``; per head the projection's rows are ``b``, ``c`` and ``x``."""

    def __init__(self, config: LongspanConfig, options: dict):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.num_attention_heads * config.head_dim
        self.in_proj = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.conv_weight = nn.Parameter(torch.zeros(width, options["conv_kernel"]))

    def forward(self, hidden: Tensor, positions: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        rows = self.in_proj(hidden).unflatten(-1, (self.heads, -1))
        b, c, x = (part.flatten(2) for part in rows.chunk(3, -1))
        return self.out_proj(
            c * convolved(b * x * (positions >= 0)[..., None], self.conv_weight, None, state)
        )


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
    """A mixture of MLPs, and one that all tokens go through where the config has its size."""

    def __init__(self, config: LongspanConfig, activation: str):
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        self.top_k, self.normed = moe["num_experts_per_tok"], moe["norm_topk_prob"]
        self.router = nn.Linear(hidden, moe["num_experts"], bias=False)
        self.experts = nn.ModuleList(
            MLP(hidden, moe["intermediate_size"], activation) for _ in range(moe["num_experts"])
        )
        self.shared = (
            MLP(hidden, shared, activation)
            if (shared := moe["shared_expert_intermediate_size"])
            else None
        )
        self.shared_gate = (
            nn.Linear(hidden, 1, bias=False) if shared and moe["shared_expert_gate"] else None
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = F.linear(tokens.float(), self.router.weight.float())
        if self.normed:
            weights, chosen = scores.topk(self.top_k)
            weights = weights.softmax(-1)
        else:
            weights, chosen = scores.softmax(-1).topk(self.top_k)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out[token] += expert(tokens[token]) * weights[token, place, None].to(tokens.dtype)
        if self.shared is not None:
            shared = self.shared(tokens)
            out = out + (
                shared
                if self.shared_gate is None
                else torch.sigmoid(self.shared_gate(tokens)) * shared
            )
        return out.view_as(x)


MIXERS = {"softmax": SoftmaxMixer, "linear": LinearMixer, "convolution": ConvolutionMixer}


class LongspanLayer(nn.Module):
    """A mixer and an MLP, each with its norms and its way of joining the residual stream."""

    def __init__(self, config: LongspanConfig, layer: dict):
        super().__init__()
        self.norm, self.scales = layer["norm"], (layer["mixer_residual"], layer["mlp_residual"])
        self.mixer = MIXERS[layer["mixer"]["kind"]](config, layer["mixer"])
        if layer["mlp"] == "moe":
            self.mlp = Experts(config, layer["mlp_activation"])
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, layer["mlp_activation"])
        names = ["input_norm", "mlp_norm"] if self.norm != "reordered" else []
        names += (
            ["mixer_output_norm", "mlp_output_norm"]
            if self.norm in ("sandwich", "reordered")
            else []
        )
        for name in names:
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, positions: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        x = self._join(
            x,
            lambda x: self.mixer(x, positions, state),
            "input_norm",
            "mixer_output_norm",
            self.scales[0],
        )
        return self._join(x, self.mlp, "mlp_norm", "mlp_output_norm", self.scales[1])

    def _join(self, x: Tensor, branch, before: str, after: str, scales: list[float]) -> Tensor:
        normed = self._modules[before](x) if before in self._modules else x
        out = branch(normed)
        out = self._modules[after](out) if after in self._modules else out
        return scales[0] * (normed if self.norm == "post" else x) + scales[1] * out


class LongspanPreTrainedModel(PreTrainedModel):
    config_class = LongspanConfig
    base_model_prefix = "model"
    _no_split_modules = ["LongspanLayer"]
    _skip_keys_device_placement = ["past_key_values"]
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
        """``attention_mask [batch, all tokens so far]`` marks real tokens; padding must come before them."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = LongspanCache(len(self.layers))
        seen = past_key_values.seen if past_key_values is not None else 0
        positions = _positions(x, attention_mask, seen)
        if position_ids is not None and (position_ids != positions)[positions >= 0].any():
            raise ValueError(
                "position_ids: tokens count from 0 at the first that attention_mask marks; leave position_ids out"
            )
        for number, layer in enumerate(self.layers):
            x = layer(
                x, positions, None if past_key_values is None else past_key_values.states[number]
            )
        if past_key_values is not None:
            past_key_values.seen += x.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )


def _positions(x: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
    """Of the new tokens, ``[batch, time]``; padding is at -1."""
    if attention_mask is None:
        return torch.arange(seen, seen + x.shape[1], device=x.device).expand(len(x), -1)
    if attention_mask.shape != (len(x), seen + x.shape[1]):
        expected = [len(x), seen + x.shape[1]]
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, must be {expected}: of all tokens so far"
        )
    real = attention_mask.bool()
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError(
            "attention_mask: padding must come before the tokens (padding_side='left')"
        )
    return (real.long().cumsum(1) - 1)[:, seen:]


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
        loss = (
            self.loss_function(logits, labels, self.config.vocab_size)
            if labels is not None
            else None
        )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )
