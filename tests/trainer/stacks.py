"""Stacks of layers that the tiny recipe lacks, as overrides of it."""

import json

PATTERNS = "model.layers=" + json.dumps(
    {
        "blocks": {
            "window": {
                "mixer": "window",
                "window": 11,
                "attention_sink": True,
                "norm": "reordered",
            },
            "streaming": {
                "mixer": "streaming",
                "sinks": 3,
                "window": 7,
                "qk_norm": True,
                "softcap": 4.0,
            },
            "sparse": {
                "mixer": "s2",
                "block": 4,
                "local_blocks": 2,
                "stride": 4,
                "dense_heads": 1,
                "offset": 1,
                "near": [5, 2],
                "attention_sink": True,
                "softcap": 6.0,
                "output_gate": True,
            },
            "heads": {
                "mixer": "pattern",
                "pattern": "PerHead([Window(5) | Sinks(2), Dilated(2, 3, 4)]) | Stripes(4, 6)",
                "attention_sink": True,
                "rotary_fraction": 0.5,
            },
        },
        "pattern": ["window", "streaming", "sparse", "heads"],
    }
)


def _stack(blocks: dict[str, dict]) -> str:
    return "model.layers=" + json.dumps({"blocks": blocks, "pattern": list(blocks)})


MIXED = _stack(
    {
        "lightning": {"mixer": "lightning"},
        "delta": {"mixer": "gated_deltanet", "num_key_heads": 2},
        "sparse": {"mixer": "s2", "block": 8, "local_blocks": 2, "stride": 2},
        "full": {"mixer": "full", "qk_norm": True},
    }
)
"""One mixer of each family; the delta rule has a short convolution."""

MOBA = _stack({"moba": {"mixer": "moba", "block": 8, "top_k": 3}, "full": {"mixer": "full"}})

EXPERTS = [
    _stack(
        {
            "lightning": {"mixer": "lightning", "norm": "post", "mlp": "moe"},
            "full": {"mixer": "full", "mlp": "moe"},
        }
    ),
    "model.moe="
    + json.dumps({"num_experts": 4, "intermediate_size": 48, "router_aux_loss_coef": 0.1}),
]
"""A hybrid with experts, like MiniMax-01."""

SHARED_EXPERT = [
    _stack({"delta": {"mixer": "gated_deltanet"}, "full": {"mixer": "full", "mlp": "moe"}}),
    "model.moe="
    + json.dumps(
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 32,
            "shared_expert_gate": True,
            "norm_topk_prob": False,
        }
    ),
]
"""Every second layer has experts, like Qwen3-Next."""

LINEAR = [
    "model.num_hidden_layers=8",
    _stack(
        {
            "delta": {
                "mixer": "gated_deltanet",
                "num_key_heads": 2,
                "allow_negative_eigenvalues": True,
            },
            "kimi": {"mixer": "kda"},
            "sparse": {"mixer": "s2", "block": 8, "local_blocks": 2, "stride": 2},
            "mamba": {"mixer": "mamba2", "num_key_heads": 2, "key_head_dim": 12},
            "gated": {"mixer": "gla", "decay_rank": 6},
            "conv": {"mixer": "conv"},
            "lightning": {"mixer": "lightning", "norm": "post"},
            "full": {"mixer": "full", "qk_norm": True},
        }
    ),
]
"""Linear mixers between a sparse and a full layer."""

LINEAR_MORE = [
    "model.num_hidden_layers=8",
    _stack(
        {
            "transnormer": {
                "mixer": "lightning",
                "style": "transnormer",
                "mlp_activation": "identity",
            },
            "linear": {"mixer": "linear"},
            "retention": {"mixer": "retention"},
            "based": {"mixer": "based", "key_head_dim": 8},
            "hedgehog": {"mixer": "hedgehog"},
            "delta": {"mixer": "deltanet"},
            "gated": {"mixer": "simple_gla"},
            "paper": {"mixer": "lightning", "decay": "paper", "output_gate": False},
        }
    ),
]
"""The remaining linear mixers, without a softmax layer."""
