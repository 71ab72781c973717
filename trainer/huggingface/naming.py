"""Tensor maps of a model's parts, under the names that most models of ``transformers`` use.

These are the names in memory; what the models write to disk may have others.
"""

from collections.abc import Iterator

import numpy as np

from ..recipe.schema import ModelConfig
from .tensor_map import TensorMap, fused_rows


def embeddings(
    model: ModelConfig, vocab_size: int, norm_offset: float = 0.0
) -> Iterator[TensorMap]:
    """Yield the maps of the embedding, the last norm and, unless it is the embedding, the output
    matrix.
    """
    token_rows = np.arange(vocab_size)  # without the padding
    yield TensorMap("embedding.word_embeddings.weight", {"model.embed_tokens.weight": token_rows})
    yield TensorMap("decoder.final_layernorm.weight", {"model.norm.weight": None}, norm_offset)
    if not model.tie_word_embeddings:
        yield TensorMap("output_layer.weight", {"lm_head.weight": token_rows})


def layer_parameter(
    layer: int, megatron_name: str, hf_name: str, hf_offset: float = 0.0
) -> TensorMap:
    """Return the map of a parameter of a layer that is one Hugging Face tensor, by their names in
    the layer.
    """
    return TensorMap(
        f"decoder.layers.{layer}.{megatron_name}",
        {f"model.layers.{layer}.{hf_name}": None},
        hf_offset,
    )


def norms(layer: int, norm_offset: float = 0.0) -> Iterator[TensorMap]:
    """Yield the maps of the norms before the mixer and before the MLP."""
    names = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    for megatron_name, hf_name in names.items():
        yield layer_parameter(layer, f"{megatron_name}.weight", f"{hf_name}.weight", norm_offset)


def softmax(
    model: ModelConfig, layer: int, output_gate: bool = False, hf_output_gate: bool = False
) -> Iterator[TensorMap]:
    """Yield the maps of the projections of softmax attention.

    With gates, each head's queries and gates are in one matrix, as in Qwen3-Next. If only one side
    has gates, the two have nothing but the output projection in common.
    """
    num_heads, head_dim = model.num_attention_heads, model.kv_channels
    yield layer_parameter(layer, "mixer.linear_proj.weight", "self_attn.o_proj.weight")
    if output_gate != hf_output_gate:
        return

    query_rows = num_heads // model.kv_heads * head_dim  # of one KV head
    gate_rows = query_rows if output_gate else 0
    sizes = (query_rows, gate_rows, head_dim, head_dim)
    q, gates, k, v = fused_rows(model.kv_heads, sizes)  # [kv_heads, rows] each
    if output_gate:
        q = np.stack([q.reshape(num_heads, head_dim), gates.reshape(num_heads, head_dim)], axis=1)

    prefix = f"model.layers.{layer}.self_attn"
    yield TensorMap(
        f"decoder.layers.{layer}.mixer.linear_in.weight",
        {
            f"{prefix}.q_proj.weight": q.flatten(),
            f"{prefix}.k_proj.weight": k.flatten(),
            f"{prefix}.v_proj.weight": v.flatten(),
        },
    )


def qk_norms(layer: int, each_head: bool, norm_offset: float = 0.0) -> Iterator[TensorMap]:
    """Yield the maps of the norms of queries and keys: of each head, or of all heads together."""
    suffix = "layernorm" if each_head else "norm"
    for name in ("q", "k"):
        megatron_name = f"mixer.{name}_{suffix}.weight"
        hf_name = f"self_attn.{name}_norm.weight"
        yield layer_parameter(layer, megatron_name, hf_name, norm_offset)


def mlp(model: ModelConfig, layer: int) -> Iterator[TensorMap]:
    """Yield the maps of a dense MLP."""
    gate_rows, up_rows = np.split(np.arange(2 * model.intermediate_size), 2)
    prefix = f"model.layers.{layer}.mlp"
    yield TensorMap(
        f"decoder.layers.{layer}.mlp.linear_fc1.weight",
        {f"{prefix}.gate_proj.weight": gate_rows, f"{prefix}.up_proj.weight": up_rows},
    )
    yield layer_parameter(layer, "mlp.linear_fc2.weight", "mlp.down_proj.weight")


def stacked_experts(layer: int, num_experts: int | None) -> Iterator[TensorMap]:
    """Yield the maps of a router and of experts whose matrices are stacked, as in Mixtral; None is
    for a dense MLP, which becomes the only expert.
    """
    if num_experts is None:
        yield from _expert(layer, "mlp", 0)
        return
    yield layer_parameter(layer, "mlp.router.weight", "mlp.gate.weight")
    for expert in range(num_experts):
        yield from _expert(layer, f"mlp.experts.local_experts.{expert}", expert)


def _expert(layer: int, megatron_name: str, hf_index: int) -> Iterator[TensorMap]:
    for matrix, hf_matrix in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
        yield TensorMap(
            f"decoder.layers.{layer}.{megatron_name}.{matrix}.weight",
            {f"model.layers.{layer}.mlp.experts.{hf_matrix}": None},
            hf_index=hf_index,
        )
