"""Tensor maps of linear attention.

Our fused projection has, for each key head, the rows of its query, its key and its values, then
those of its values' gates, betas and decays. The published models order these rows in other ways.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...layers.linear_design import LinearDesign
from ..naming import layer_parameter
from ..tensor_map import TensorMap, fused_rows


def by_part(
    design: LinearDesign, layer: int, projections: Mapping[str, Sequence[str]]
) -> TensorMap:
    """Return the map of a fused projection whose Hugging Face tensors have one part of all heads
    after another.

    Args:
        projections: the parts of each tensor, by its name in the layer; see :func:`_parts`.
    """
    parts = _parts(design)
    rows = {
        name: np.concatenate([parts[part].flatten() for part in names])
        for name, names in projections.items()
    }
    return _fused_projection(layer, rows)


def by_head(
    design: LinearDesign, layer: int, projections: Mapping[str, Sequence[str]]
) -> TensorMap:
    """Return the map of a fused projection whose Hugging Face tensors have one key head, with all
    its parts, after another; otherwise as :func:`by_part`.
    """
    parts = _parts(design)
    rows = {
        name: np.concatenate([parts[part] for part in names], axis=1).flatten()
        for name, names in projections.items()
    }
    return _fused_projection(layer, rows)


def gated_delta(
    design: LinearDesign,
    layer: int,
    projections: Mapping[str, Sequence[str]],
    norm: str,
    out_proj: str,
) -> Iterator[TensorMap]:
    """Yield the maps of a gated delta mixer, with its names of the projections and the norm.

    Args:
        projections: the parts of each input projection, by its name in the mixer.
    """
    in_layer = {f"linear_attn.{name}": parts for name, parts in projections.items()}
    yield by_part(design, layer, in_layer)
    yield _convolution(design, layer, ("q", "k", "v"), "linear_attn.conv1d")
    yield layer_parameter(layer, "mixer.decay.rate_log", "linear_attn.A_log")
    yield layer_parameter(layer, "mixer.decay.bias", "linear_attn.dt_bias")
    yield layer_parameter(layer, "mixer.norm.weight", f"linear_attn.{norm}.weight")
    yield layer_parameter(layer, "mixer.linear_proj.weight", f"linear_attn.{out_proj}.weight")


def mamba2(design: LinearDesign, layer: int) -> Iterator[TensorMap]:
    """Yield the maps of a Mamba-2 mixer, whose values are called x, keys B and queries C."""
    yield by_part(design, layer, {"mamba.in_proj": ("gate", "v", "k", "q", "decay")})
    conv_parts = ("v", "k", "q")
    yield _convolution(design, layer, conv_parts, "mamba.conv1d")
    yield TensorMap(
        f"decoder.layers.{layer}.mixer.conv_bias",
        {f"model.layers.{layer}.mamba.conv1d.bias": _channels(design, conv_parts)},
    )
    yield layer_parameter(layer, "mixer.decay.rate_log", "mamba.A_log")
    yield layer_parameter(layer, "mixer.decay.bias", "mamba.dt_bias")
    yield layer_parameter(layer, "mixer.skip", "mamba.D")
    yield layer_parameter(layer, "mixer.norm.weight", "mamba.norm.weight")
    yield layer_parameter(layer, "mixer.linear_proj.weight", "mamba.out_proj.weight")


def _fused_projection(layer: int, rows: Mapping[str, np.ndarray]) -> TensorMap:
    return TensorMap(
        f"decoder.layers.{layer}.mixer.linear_in.weight",
        {f"model.layers.{layer}.{name}.weight": of_name for name, of_name in rows.items()},
    )


def _parts(design: LinearDesign) -> dict[str, np.ndarray]:
    """Return the rows of each part of the fused projection, ``[key heads, rows]``; ``qkv`` is
    query, key and values together.
    """
    qkv, gate, beta, decay = fused_rows(design.key_heads, design.parts)
    q, k, v = np.split(qkv, [design.key_dim, 2 * design.key_dim], axis=1)
    return {"q": q, "k": k, "v": v, "qkv": qkv, "gate": gate, "beta": beta, "decay": decay}


def _convolution(design: LinearDesign, layer: int, parts: Sequence[str], hf_name: str) -> TensorMap:
    return TensorMap(
        f"decoder.layers.{layer}.mixer.conv_weight",
        {f"model.layers.{layer}.{hf_name}.weight": _channels(design, parts)},
        hf_conv1d=True,
    )


def _channels(design: LinearDesign, parts: Sequence[str]) -> np.ndarray:
    """Return the channels of the convolution in which each part of all heads follows another.

    Ours are those of the fused projection: per key head its query, its key and its values.
    """
    value_rows = design.group * design.value_dim
    q, k, v = fused_rows(design.key_heads, (design.key_dim, design.key_dim, value_rows))
    channels = {"q": q, "k": k, "v": v}
    return np.concatenate([channels[part].flatten() for part in parts])
