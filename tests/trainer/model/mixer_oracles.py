"""Mixers by their papers' formulas in fp64, for one document and one head at a time.

They compute all pairs of tokens or go token by token. Each accepts the layer's input ``x``
[tokens, hidden], the mixer's weights by name, the recipe's model and the layer, and returns what
the layer adds to the residual stream.
"""

import math

import torch
import torch.nn.functional as F


def project_by_head(x, w, *dims):
    """Return the fused projection split by heads: for each head the list of its parts."""
    heads = (x @ w["linear_in.weight"].T).split(sum(dims), -1)
    return [head.split(dims, -1) for head in heads]


def project_out(outs, w):
    return torch.cat(outs, -1) @ w["linear_proj.weight"].T


def rms(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def causal(weights):
    return weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), 0)


def with_decay(q, k, v, log):
    """``o_i = sum_j (q_i . k_j, each product times exp(log_{j+1} + ... + log_i)) v_j``.

    ``log`` is [tokens, 1 or key dims].
    """
    sums = log.cumsum(0)
    decay_between = sums[:, None] - sums[None]
    decay_between = decay_between.masked_fill(
        torch.ones(len(q), len(q)).triu(1).bool()[..., None], -torch.inf
    )
    return torch.einsum("ik,jk,ijk->ij", q, k, decay_between.exp().expand(-1, -1, q.shape[1])) @ v


def with_constant_decay(q, k, v, log):
    return with_decay(q, k, v, torch.full((len(q), 1), log))


def weighted_mean(weights, v):
    """Return the papers' weighted mean of the values, with 1e-6 added to the sum of weights."""
    weights = causal(weights)
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def convolve(x, weight):
    """``y_t = sum_j weight_j x_{t - width + 1 + j}`` per channel; zeros before the document."""
    width = weight.shape[1]
    before = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    return torch.stack([(before[t : t + width] * weight.T).sum(0) for t in range(len(x))])


def rotate(x, theta):
    """Apply RoFormer's rotation; the i-th pair consists of dims i and i + dim / 2."""
    half = x.shape[1] // 2
    angles = torch.stack(
        [torch.arange(len(x)) * theta ** (-2 * i / x.shape[1]) for i in range(half)], -1
    )
    a = x[:, :half]
    b = x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def linear(x, w, model, layer):
    def phi(x):
        return torch.where(x > 0, x + 1, x.exp())

    dim = model.kv_channels
    return project_out(
        [weighted_mean(phi(q) @ phi(k).T, v) for q, k, v in project_by_head(x, w, dim, dim, dim)], w
    )


def lightning_paper(x, w, model, layer):
    heads, dim = model.num_attention_heads, model.kv_channels
    parts = project_by_head(x, w, dim, dim, dim, dim)
    logs = [-8 * h / heads * (1 - layer / model.num_hidden_layers) for h in range(heads)]
    outs = [
        with_constant_decay(F.silu(q), F.silu(k), F.silu(v), log)
        for (q, k, v, _), log in zip(parts, logs, strict=True)
    ]
    out = rms(torch.cat(outs, -1), model.rms_norm_eps) * w["norm.weight"]
    return project_out([out * torch.sigmoid(torch.cat([gate for *_, gate in parts], -1))], w)


def transnormer(x, w, model, layer):
    heads, dim = model.num_attention_heads, model.kv_channels
    parts = project_by_head(x, w, dim, dim, dim, dim)
    outs = []
    for head, (q, k, v, _) in enumerate(parts):
        q = F.silu(q)
        k = F.silu(k)
        if layer == 0:
            angles = torch.arange(len(x))[:, None] * w["angles"][head]
            q, k = (torch.cat([angles.cos() * part, angles.sin() * part], -1) for part in (q, k))
        slope = 2 ** (-8 * (head + 1) / heads) * (
            1 - layer / (model.num_hidden_layers - 1 + 1e-5) + 1e-5
        )
        outs.append(with_constant_decay(q, k, v, -slope))
    out = rms(torch.cat(outs, -1), model.rms_norm_eps)
    return project_out([out * torch.cat([gate for *_, gate in parts], -1)], w)


def retention(x, w, model, layer):
    dim = model.kv_channels
    outs = []
    for head, (q, k, v, gate) in enumerate(project_by_head(x, w, dim, dim, 2 * dim, 2 * dim)):
        q = rotate(q, model.rope_theta)
        k = rotate(k, model.rope_theta)
        out = with_constant_decay(q, k, v, math.log(1 - 2 ** (-5 - head))) / dim**0.5
        outs.append(rms(out, model.rms_norm_eps) * F.silu(gate))
    return project_out(outs, w)


def simple_gla(x, w, model, layer):
    dim = model.kv_channels
    outs = []
    for head, (q, k, v, gate, decay) in enumerate(project_by_head(x, w, dim, dim, dim, dim, 1)):
        out = with_decay(q, k, v, F.logsigmoid(decay + w["decay.bias"][head]) / 16) / dim**0.5
        outs.append(rms(out, model.rms_norm_eps) * w["norm.weight"] * F.silu(gate))
    return project_out(outs, w)


def gla(x, w, model, layer):
    dim = model.kv_channels
    outs = []
    decay_in = x @ w["decay_in.down.weight"].T @ w["decay_in.up.weight"].T
    logs = F.logsigmoid(decay_in + w["decay.bias"]) / 16
    heads = zip(
        project_by_head(x, w, dim // 2, dim // 2, dim, dim), logs.split(dim // 2, -1), strict=True
    )
    for (q, k, v, gate), log in heads:
        out = with_decay(q, k, v, log) / (dim // 2) ** 0.5
        outs.append(rms(out, model.rms_norm_eps) * w["norm.weight"] * F.silu(gate))
    return project_out(outs, w)


def based(x, w, model, layer):
    def phi(x):
        """Return the paper's feature map, with all ``dim^2`` products."""
        dim = x.shape[1]
        square = torch.einsum("ta,tb->tab", x, x).flatten(1) / (2 * dim) ** 0.5
        return torch.cat([torch.ones(len(x), 1), x / dim**0.25, square], -1)

    return project_out(
        [
            weighted_mean(phi(q) @ phi(k).T, v)
            for q, k, v in project_by_head(x, w, 16, 16, model.kv_channels)
        ],
        w,
    )


def hedgehog(x, w, model, layer):
    def phi(x, weight):
        features = torch.cat([2 * x @ weight.T, -2 * x @ weight.T], -1).exp()
        return features / features.sum(-1, keepdim=True)

    dim = model.kv_channels
    heads = zip(
        project_by_head(x, w, dim, dim, dim),
        w["map_q"].split(dim),
        w["map_k"].split(dim),
        strict=True,
    )
    return project_out(
        [weighted_mean(phi(q, map_q) @ phi(k, map_k).T, v) for (q, k, v), map_q, map_k in heads], w
    )


def deltanet(x, w, model, layer, beta_scale=1):
    """Replace a share of what a key recalls: ``beta_scale`` times a sigmoid."""
    dim = model.kv_channels
    outs = []
    for head, (qkv, beta) in enumerate(project_by_head(x, w, 3 * dim, 1)):
        if "conv_weight" in w:
            qkv = convolve(qkv, w["conv_weight"].split(3 * dim)[head])
        q, k, v = F.silu(qkv).split(dim, -1)
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        state = torch.zeros(dim, dim)
        steps = []
        for q_t, k_t, v_t, beta_t in zip(q, k, v, beta_scale * torch.sigmoid(beta), strict=True):
            old = k_t @ state
            state = state + torch.outer(k_t, beta_t * v_t + (1 - beta_t) * old - old)
            steps.append(q_t @ state / dim**0.5)
        outs.append(rms(torch.stack(steps), model.rms_norm_eps) * w["norm.weight"])
    return project_out(outs, w)


def convolution(x, w, model, layer):
    dim = model.kv_channels
    parts = zip(project_by_head(x, w, dim, dim, dim), w["conv_weight"].split(dim), strict=True)
    return project_out([c * convolve(b * x, weight) for (b, c, x), weight in parts], w)
