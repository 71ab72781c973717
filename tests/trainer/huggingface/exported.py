"""Stacks of every architecture that a model is exported as, and runs that train them."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from longspan.launch.process import process_group
from longspan.trainer.recipe.file import load_recipe, to_yaml

STEP = 3
WIDE = pytest.mark.wide


def stack(blocks: dict[str, dict], pattern: list[str] | None = None) -> str:
    return "model.layers=" + json.dumps({"blocks": blocks, "pattern": pattern or list(blocks)})


def mixers(*names: str) -> str:
    return stack({name: {"mixer": name} for name in names})


FULL = {"mixer": "full"}
WINDOW = {"mixer": "window", "window": 37}
DELTA = {"mixer": "gated_deltanet", "key_head_dim": 16, "value_head_dim": 24}
GATED = {**FULL, "qk_norm": True, "output_gate": True, "rotary_fraction": 0.25}
OLMO = {**FULL, "qk_norm": "all", "norm": "reordered"}
POST = {"norm": "post", "mixer_residual": [1.5, 0.5], "mlp_residual": [2.0, 0.7]}
S2 = {"mixer": "s2", "block": 16, "local_blocks": 2, "stride": 2}
HEADS = {
    "mixer": "pattern",
    "pattern": "PerHead([Window(5) | Sinks(2), Dilated(2, 3, 4)]) | Stripes(4, 6)",
    "output_gate": True,
}
MOE = 'model.moe={"num_experts": 4, "intermediate_size": 48}'
SHARED_EXPERT = "model.moe=" + json.dumps(
    {
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "shared_expert_gate": True,
        "norm_topk_prob": False,
    }
)
EPS = "model.rms_norm_eps=1e-6"
NATIVE = {
    "llama": [stack({"full": FULL}), "model.head_dim=24", "model.tie_word_embeddings=true"],
    "mistral": [stack({"w": WINDOW})],
    "ministral": [stack({"w": WINDOW, "full": FULL})],
    "qwen3": [stack({"w": {**WINDOW, "qk_norm": True}, "full": {**FULL, "qk_norm": True}})],
    "minimax": [
        stack({"l": {"mixer": "lightning", **POST}, "full": {**FULL, **POST}}, ["l", "l", "full"]),
        EPS,
    ],
    "qwen3_5_text": [
        stack({"d": {**DELTA, "num_key_heads": 2}, "full": GATED}),
        "model.head_dim=32",
    ],
    "olmo_hybrid": [
        stack({"d": {**DELTA, "allow_negative_eigenvalues": True}, "full": OLMO}),
        "model.rms_norm_eps=1e-5",
    ],
    "granitemoehybrid": [
        stack({"m": {"mixer": "mamba2", "num_key_heads": 2, "key_head_dim": 16}, "full": FULL})
    ],
}
MORE_NATIVE = {
    "minimax, experts": [
        stack({k: {"mixer": k, "norm": "post", "mlp": "moe"} for k in ("lightning", "full")}),
        MOE,
        EPS,
    ],
    "minimax, other decays": [
        stack(
            {
                "l": {"mixer": "lightning", "norm": "post", "decay": "paper"},
                "full": {**FULL, "norm": "post"},
            }
        ),
        EPS,
    ],
    "olmo_hybrid, no positions": [
        stack({"d": DELTA, "full": {**OLMO, "rotary_fraction": 0.0}}),
        "model.rms_norm_eps=1e-5",
    ],
    "granitemoehybrid, no positions": [
        stack({"m": {"mixer": "mamba2"}, "full": {**FULL, "rotary_fraction": 0.0}})
    ],
}
CUSTOM = {
    "s2": [
        stack(
            {
                "s2": {**S2, "attention_sink": True},
                "full": {**FULL, "norm": "sandwich", "softcap": 5.0},
            }
        )
    ],
    "delta": [mixers("deltanet", "gated_deltanet", "kda", "conv")],
    "patterns": [
        stack(
            {
                "a": {"mixer": "streaming", "sinks": 3, "window": 20},
                "b": HEADS,
                "c": {**WINDOW, "qk_norm": "all"},
            }
        )
    ],
    "experts": [stack({"s2": {**S2, "mlp": "moe"}, "full": FULL}), SHARED_EXPERT],
}
MORE_CUSTOM = {
    "fixed decays": [mixers("linear", "lightning", "retention", "simple_gla")],
    "feature maps": [mixers("gla", "based", "hedgehog", "mamba2")],
    "transnormer": [
        stack({"t": {"mixer": "lightning", "style": "transnormer", "mlp_activation": "identity"}})
    ],
}


def save_run(recipe_file: Path, *overrides: str) -> Path:
    """Return the folder of a run with one checkpoint; all its weights have noise, norms too."""
    from longspan.trainer.checkpoint.run_folder import RunFolder
    from longspan.trainer.engines.build import build_engine
    from longspan.trainer.ranks import RankGroup
    from longspan.trainer.run.checkpointer import Checkpointer

    recipe = load_recipe(str(recipe_file), ["training.seq_length=192", *overrides])
    folder = RunFolder(recipe.run_dir)
    folder.path.mkdir(parents=True)
    folder.recipe_file.write_text(to_yaml(recipe))

    generator = torch.Generator().manual_seed(1)
    noise_by_ndim = {1: 0.3, 2: 0.15}
    with process_group(2), contextlib.closing(build_engine(recipe)) as engine:
        noisy_weights = {}
        for name, weight in engine.weights().items():
            noise = torch.randn(weight.shape, generator=generator)
            noisy_weights[name] = weight + noise_by_ndim[weight.ndim] * noise
        engine.load_weights(noisy_weights)
        with Checkpointer(folder.checkpoints, 3, RankGroup()) as checkpointer:
            checkpointer.save(engine, STEP, 100)
            assert not checkpointer.poll(wait=True).error
    return folder.path


def default_cases(stacks: dict[str, list[str]]) -> list:
    return [pytest.param(name, overrides, id=name) for name, overrides in stacks.items()]


def wide_cases(stacks: dict[str, list[str]]) -> list:
    return [
        pytest.param(name, overrides, marks=WIDE, id=name) for name, overrides in stacks.items()
    ]
