"""Our parameters' rows under the names that models of ``transformers`` have in memory (what they write to disk may differ)."""

from collections.abc import Iterator

import numpy as np

from ..layers.base import Block
from ..layers.convolution import ConvolutionBlock
from ..layers.linear import LinearAttentionBlock, LinearDesign
from ..recipe.schema import ModelConfig, MoEConfig
from .tensor_map import TensorMap, parts_of


def ends(model: ModelConfig, vocab_size: int, shift: float = 0.0) -> Iterator[TensorMap]:
    """Embedding, last norm and output matrix."""
    words = np.arange(vocab_size)
    yield TensorMap("embedding.word_embeddings.weight", {"model.embed_tokens.weight": words})
    yield TensorMap("decoder.final_layernorm.weight", {"model.norm.weight": None}, shift)
    if not model.tie_word_embeddings:
        yield TensorMap("output_layer.weight", {"lm_head.weight": words})


def whole(
    layer: int, ours: str, theirs: str, shift: float = 0.0, channels: bool = False
) -> TensorMap:
    """A parameter of a layer that is theirs as it is."""
    return TensorMap(
        f"decoder.layers.{layer}.{ours}", {f"model.layers.{layer}.{theirs}": None}, shift, channels
    )


def norms(layer: int, mixer: str, mlp: str, shift: float = 0.0) -> Iterator[TensorMap]:
    """Those before a layer's halves."""
    yield whole(layer, "input_layernorm.weight", f"{mixer}.weight", shift)
    yield whole(layer, "pre_mlp_layernorm.weight", f"{mlp}.weight", shift)


def softmax(
    model: ModelConfig, layer: int, gate: bool = False, theirs_gated: bool = False
) -> Iterator[TensorMap]:
    """Projections of softmax attention; where theirs has gates, each head's queries and gates are in one matrix, as in
    Qwen3-Next. Where one side alone has gates, the output projection is all they share.
    """
    heads, dim = model.num_attention_heads, model.kv_channels
    queries = heads // model.kv_heads * dim
    yield whole(layer, "mixer.linear_proj.weight", "self_attn.o_proj.weight")
    if gate != theirs_gated:
        return
    q, gates, k, v = parts_of(model.kv_heads, (queries, queries if gate else 0, dim, dim))
    if gate:
        q = np.stack([q.reshape(heads, dim), gates.reshape(heads, dim)], 1)
    theirs = {"q_proj": q.flatten(), "k_proj": k.flatten(), "v_proj": v.flatten()}
    prefix = f"model.layers.{layer}.self_attn"
    yield TensorMap(
        f"decoder.layers.{layer}.mixer.linear_in.weight",
        {f"{prefix}.{name}.weight": rows for name, rows in theirs.items()},
    )


def qk_norms(layer: int, ours: str = "layernorm", shift: float = 0.0) -> Iterator[TensorMap]:
    for name in "qk":
        yield whole(layer, f"mixer.{name}_{ours}.weight", f"self_attn.{name}_norm.weight", shift)


def linear(
    design: LinearDesign, layer: int, names: dict[str, tuple[str, ...]], together: bool = False
) -> TensorMap:
    """The fused projection of linear attention under ``names``, each with the parts that it is made of; ``qkv`` is all three.

    ``together`` keeps a head's parts together; else each part comes with all its heads.
    """
    found = {}
    for name, parts in names.items():
        rows = [_parts(design)[part] for part in parts]
        found[f"model.layers.{layer}.{name}.weight"] = (
            np.concatenate(rows, 1).flatten()
            if together
            else np.concatenate([r.flatten() for r in rows])
        )
    return TensorMap(f"decoder.layers.{layer}.mixer.linear_in.weight", found)


def _parts(design: LinearDesign) -> dict[str, np.ndarray]:
    """Rows of the fused projection, ``[key heads, rows]`` each."""
    mixed, gate, beta, decay = parts_of(design.key_heads, design.parts)
    q, k, v = np.split(mixed, [design.key_dim, 2 * design.key_dim], axis=1)
    return {"q": q, "k": k, "v": v, "qkv": mixed, "gate": gate, "beta": beta, "decay": decay}


def _channels(design: LinearDesign, *parts: str) -> np.ndarray:
    """Of the convolution, which goes over a key head's query, key and values: those of all heads for each of ``parts``."""
    q, k, v = parts_of(
        design.key_heads, (design.key_dim, design.key_dim, design.group * design.value_dim)
    )
    found = {"q": q, "k": k, "v": v}
    return np.concatenate([found[part].flatten() for part in parts])


def gated_delta(
    design: LinearDesign, layer: int, projections: dict[str, tuple[str, ...]], norm: str, out: str
) -> Iterator[TensorMap]:
    """A gated delta mixer, with their names of the projections from the hidden state and what each is made of."""
    ours, theirs = f"decoder.layers.{layer}.mixer", f"model.layers.{layer}.linear_attn"
    yield linear(
        design, layer, {f"linear_attn.{name}": parts for name, parts in projections.items()}
    )
    yield TensorMap(
        f"{ours}.conv_weight",
        {f"{theirs}.conv1d.weight": _channels(design, "q", "k", "v")},
        channels=True,
    )
    yield TensorMap(f"{ours}.decay.rate_log", {f"{theirs}.A_log": None})
    yield TensorMap(f"{ours}.decay.bias", {f"{theirs}.dt_bias": None})
    yield whole(layer, "mixer.norm.weight", f"linear_attn.{norm}.weight")
    yield whole(layer, "mixer.linear_proj.weight", f"linear_attn.{out}.weight")


def mamba2(design: LinearDesign, layer: int) -> Iterator[TensorMap]:
    """Queries are called C, keys B."""
    ours, theirs = f"decoder.layers.{layer}.mixer", f"model.layers.{layer}.mamba"
    yield linear(design, layer, {"mamba.in_proj": ("gate", "v", "k", "q", "decay")})
    channels = _channels(design, "v", "k", "q")
    yield TensorMap(f"{ours}.conv_weight", {f"{theirs}.conv1d.weight": channels}, channels=True)
    yield TensorMap(f"{ours}.conv_bias", {f"{theirs}.conv1d.bias": channels})
    yield TensorMap(f"{ours}.decay.rate_log", {f"{theirs}.A_log": None})
    yield TensorMap(f"{ours}.decay.bias", {f"{theirs}.dt_bias": None})
    yield TensorMap(f"{ours}.skip", {f"{theirs}.D": None})
    yield whole(layer, "mixer.norm.weight", "mamba.norm.weight")
    yield whole(layer, "mixer.linear_proj.weight", "mamba.out_proj.weight")


def mlp(model: ModelConfig, layer: int) -> Iterator[TensorMap]:
    gate, up = np.split(np.arange(2 * model.intermediate_size), 2)
    prefix = f"model.layers.{layer}.mlp"
    yield TensorMap(
        f"decoder.layers.{layer}.mlp.linear_fc1.weight",
        {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up},
    )
    yield whole(layer, "mlp.linear_fc2.weight", "mlp.down_proj.weight")


def experts(layer: int, count: int | None) -> Iterator[TensorMap]:
    """A mixture's, stacked; of ``None``, the dense MLP as the only one."""
    ours, theirs = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    if count:
        yield whole(layer, "mlp.router.weight", "mlp.gate.weight")
    for entry in range(count or 1):
        prefix = f"{ours}.experts.local_experts.{entry}" if count else ours
        yield TensorMap(
            f"{prefix}.linear_fc1.weight", {f"{theirs}.experts.gate_up_proj": None}, entry=entry
        )
        yield TensorMap(
            f"{prefix}.linear_fc2.weight", {f"{theirs}.experts.down_proj": None}, entry=entry
        )


_CUSTOM = {
    "input_layernorm": "input_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "post_mixer_layernorm": "mixer_output_norm",
    "post_mlp_layernorm": "mlp_output_norm",
}
_CUSTOM_MIXER = {
    "linear_in.weight": "in_proj.weight",
    "linear_proj.weight": "out_proj.weight",
    "q_layernorm.weight": "q_norm.weight",
    "k_layernorm.weight": "k_norm.weight",
    "norm.weight": "norm_weight",
    "decay.rate_log": "rate_log",
    "decay.bias": "decay_bias",
    "decay_in.down.weight": "decay_down.weight",
    "decay_in.up.weight": "decay_up.weight",
    "gate_in.down.weight": "gate_down.weight",
    "gate_in.up.weight": "gate_up.weight",
}


def custom_layer(model: ModelConfig, block: Block, layer: int) -> Iterator[TensorMap]:
    """Under the names of our own code, row by row as they are."""
    norms = {"pre": 2, "post": 2, "sandwich": 4, "reordered": 4}[block.norm]
    for ours in list(_CUSTOM)[2 if block.norm == "reordered" else 0 : norms]:
        yield whole(layer, f"{ours}.weight", f"{_CUSTOM[ours]}.weight")
    for ours in _mixer_parameters(model, block, layer):
        yield whole(layer, f"mixer.{ours}", f"mixer.{_CUSTOM_MIXER.get(ours, ours)}")
    moe = model.moe
    for ours, theirs in _mlps(moe if block.mlp == "moe" else None):
        for half, name in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
            yield whole(layer, f"mlp{ours}.{half}.weight", f"mlp{theirs}.{name}.weight")
    if block.mlp == "moe":
        yield whole(layer, "mlp.router.weight", "mlp.router.weight")
        if moe.shared_expert_intermediate_size and moe.shared_expert_gate:
            yield whole(layer, "mlp.shared_experts.gate_weight", "mlp.shared_gate.weight")


def _mlps(moe: MoEConfig | None) -> Iterator[tuple[str, str]]:
    if moe is None:
        yield "", ""
        return
    for expert in range(moe.num_experts):
        yield f".experts.local_experts.{expert}", f".experts.{expert}"
    if moe.shared_expert_intermediate_size:
        yield ".shared_experts", ".shared"


def _mixer_parameters(model: ModelConfig, block: Block, layer: int) -> Iterator[str]:
    yield "linear_in.weight"
    yield "linear_proj.weight"
    if isinstance(block, ConvolutionBlock):
        yield "conv_weight"
    elif isinstance(block, LinearAttentionBlock):
        design = block.design(model, layer)
        learned = design.decay in ("sigmoid", "softplus")
        has = {
            "conv_weight": design.conv_kernel,
            "conv_bias": design.conv_kernel and design.conv_bias,
            "map_q": design.feature_map == "hedgehog",
            "map_k": design.feature_map == "hedgehog",
            "angles": design.feature_map == "lrpe",
            "decay_in.down.weight": design.decay_rank,
            "decay_in.up.weight": design.decay_rank,
            "decay.bias": learned,
            "decay.rate_log": design.decay == "softplus",
            "skip": design.skip,
            "norm.weight": design.norm != "none" and design.norm_weight,
            "gate_in.down.weight": design.gate_rank,
            "gate_in.up.weight": design.gate_rank,
        }
        yield from (name for name, there in has.items() if there)
    else:
        names = {False: "", True: "{}_layernorm.weight", "all": "{}_norm.weight"}[block.qk_norm]
        yield from (names.format(which) for which in "qk" if names)
        if block.attention_sink:
            yield "sinks"
