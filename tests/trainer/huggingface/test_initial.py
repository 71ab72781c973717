"""Models imported from transformers: as exported, with changed layers, on ranks, and refusals."""

import contextlib
import json
import re
import shutil

import pytest
import torch
from longspan.launch.process import process_group
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe

from .exported import FULL, MORE_NATIVE, NATIVE, S2, default_cases, save_run, stack, wide_cases


@pytest.fixture
def model_folder(tiny_recipe, tmp_path):
    """Export a run with noisy weights: ``model_folder(*overrides) -> (folder, weights)``."""

    def make(*overrides):
        from longspan.trainer.huggingface.export import export_run
        from longspan.trainer.huggingface.saved_run import SavedRun

        run = save_run(tiny_recipe, *overrides)
        folder = tmp_path / "model"
        with process_group(2):
            export_run(str(run), folder, None, lambda line: None)
        saved = SavedRun(str(run))
        weights = saved.weights(list(saved.shapes))
        shutil.rmtree(run)
        return folder, weights

    return make


@contextlib.contextmanager
def imported(recipe_file, *overrides):
    """Yield an engine with the weights of the recipe's ``initial``, and the lines printed of it."""
    from longspan.trainer.engines.build import build_engine
    from longspan.trainer.huggingface.initial import load_initial, require_initial
    from longspan.trainer.ranks import RankGroup

    recipe = load_recipe(str(recipe_file), ["training.seq_length=192", *overrides])
    require_initial(recipe)
    with process_group(2), contextlib.closing(build_engine(recipe)) as engine:
        lines = load_initial(engine, recipe, RankGroup())
        yield engine, lines


def require_refusal_by_import(recipe_file, message, *overrides):
    with pytest.raises(UserError, match=message), imported(recipe_file, *overrides):
        pass


@pytest.mark.parametrize(("name", "overrides"), default_cases(NATIVE) + wide_cases(MORE_NATIVE))
def test_export_and_import_keep_the_weights(model_folder, tiny_recipe, name, overrides):
    folder, exported = model_folder(*overrides)
    with imported(tiny_recipe, *overrides, f"initial={folder}") as (engine, lines):
        weights = engine.weights()

    assert lines == [f"starting from the weights of {folder}"]
    assert exported.keys() == weights.keys()
    for key, weight in exported.items():
        has_padding = "word_embeddings" in key or "output_layer" in key
        num_rows = 257 if has_padding else len(weight)
        assert torch.allclose(weights[key][:num_rows], weight[:num_rows], rtol=0, atol=1e-6), key


def test_llama_continues_with_sparse_layers(model_folder, tiny_recipe):
    """The pattern, length and rotary base may differ; new parameters must be named."""
    folder, exported = model_folder(stack({"full": FULL}))
    sparse = [
        stack({"s2": {**S2, "qk_norm": True}, "full": FULL}, ["s2", "full", "full", "full"]),
        "model.rope_theta=50000.0",
    ]
    k_norm = "decoder.layers.0.mixer.k_layernorm.weight"
    q_norm = "decoder.layers.0.mixer.q_layernorm.weight"
    message = (
        f"the folder's model does not have {k_norm}, {q_norm}; "
        "if that is intended, list them under initial.new"
    )
    require_refusal_by_import(tiny_recipe, re.escape(message), *sparse, f"initial={folder}")

    allowed = f'initial={{path: {folder}, new: ["decoder.layers.0.mixer.?_layernorm.weight"]}}'
    with imported(tiny_recipe, *sparse, allowed) as (engine, _):
        weights = engine.weights()
    assert torch.equal(weights.pop(q_norm), torch.ones(16))
    assert torch.equal(weights.pop(k_norm), torch.ones(16))
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[key][:257], exported[key][:257]) for key in exported)


def test_layers_that_become_linear_start_anew(model_folder, tiny_recipe):
    folder, exported = model_folder(stack({"full": FULL}))
    hybrid = [stack({"l": {"mixer": "lightning"}, "full": FULL}), "training.seed=5"]
    message = (
        r"(?s)does not have decoder.layers.\*.mixer.*norm.weight \(2 of them\);.*\n"
        r".*does not use model.layers.\*.self_attn"
    )
    require_refusal_by_import(tiny_recipe, message, *hybrid, f"initial={folder}")

    new = 'new: ["decoder.layers.[02].mixer.*"]'
    unused = 'unused: ["model.layers.[02].self_attn.*"]'
    initial = f"initial={{path: {folder}, {new}, {unused}}}"
    with imported(tiny_recipe, *hybrid, initial) as (engine, _):
        weights = engine.weights()
    linear_mixers = (".0.mixer.", ".2.mixer.")
    kept = [
        key for key in exported.keys() & weights.keys() if not any(m in key for m in linear_mixers)
    ]
    assert len(kept) > 20
    assert all(torch.equal(weights[key][:257], exported[key][:257]) for key in kept)


@pytest.mark.parametrize("degree", ["tp", pytest.param("pp", marks=pytest.mark.wide)])
def test_ranks_start_from_the_same_model(model_folder, tiny_recipe, ranks, tmp_path, degree):
    """Once the run has a checkpoint, the folder is not needed."""
    folder, _ = model_folder(stack({"full": FULL}))
    options = [
        stack({"s2": S2}),
        f"initial={folder}",
        "metrics.log_interval=1",
        "model.rope_theta=50000.0",
    ]

    def train(*overrides, processes=1):
        """Return what the command prints, and the losses."""
        count = f"launch.processes={processes}"
        outputs = ranks(processes, "longspan", "train", tiny_recipe, *options, *overrides, count)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = [record["train/loss"] for record in records if "train/loss" in record]
        return outputs[0][0], losses

    output, losses = train("training.steps=2")
    assert (
        f"starting from the weights of {folder}\n"
        "model.rope_theta: 50000.0, but the weights were trained with 10000.0\n"
    ) in output

    shutil.rmtree(tmp_path / "run")
    _, losses_of_two_ranks = train("training.steps=2", f"parallel.{degree}=2", processes=2)
    assert losses_of_two_ranks == pytest.approx(losses, rel=1e-5)
    assert losses[0] > 6  # of noisy weights; the recipe's own weights start at 5.6

    shutil.rmtree(folder)
    output, losses = train("training.steps=3")
    assert "starting from" not in output
    assert len(losses) == 3


@pytest.fixture
def refusal(tiny_recipe):
    """Return why a run does not start, before any process does: ``refusal(*overrides)``."""
    from longspan.trainer.huggingface.initial import require_initial

    def refuse(*overrides):
        with pytest.raises(UserError) as caught:
            require_initial(load_recipe(str(tiny_recipe), ["training.seq_length=192", *overrides]))
        return str(caught.value)

    return refuse


def test_files_must_match_the_config(model_folder, tiny_recipe, refusal):
    """Whether they are safetensors, in one file or several, or not."""
    from safetensors.torch import load_file, save_file

    model = [stack({"full": FULL}), "model.tie_word_embeddings=false"]
    folder, exported = model_folder(*model)
    overrides = [*model, f"initial={folder}"]
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def require_final_norm():
        name = "decoder.final_layernorm.weight"
        with imported(tiny_recipe, *overrides) as (engine, _):
            assert torch.equal(engine.weights()[name], exported[name])

    def write(changes, removed=()):
        changed = tensors | changes
        kept = {name: tensor for name, tensor in changed.items() if name not in removed}
        save_file(kept, file, {"format": "pt"})

    removed = [
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]
    missing = (
        "initial: lm_head.weight, model.layers.*.mlp.up_proj.weight (2 of them): "
        "missing from the folder's files; use a folder that is complete"
    )
    write({}, removed)
    assert refusal(*overrides) == missing

    bias = "model.layers.3.self_attn.q_proj.bias"
    write({bias: torch.ones(64)})
    assert refusal(*overrides) == (
        f"initial: the recipe's model does not use {bias}; "
        "if that is intended, list them under initial.unused"
    )
    with imported(tiny_recipe, *model, f"initial={{path: {folder}, unused: [{bias}]}}"):
        pass

    write({"model.norm.weight": torch.ones(63)})
    shapes = "shape [63] in its files, [64] by its config.json"
    assert refusal(*overrides) == f"initial: {folder}: model.norm.weight: {shapes}"

    write({})
    file.write_bytes(file.read_bytes()[:-100])
    assert refusal(*overrides).startswith(f"initial: {folder}: transformers cannot load it: ")

    # Several files of safetensors, and one of them missing.
    file.unlink()
    index = folder / "model.safetensors.index.json"
    names = sorted(tensors)
    for number in range(2):
        shard = {name: tensors[name] for name in names[number::2]}
        save_file(shard, folder / f"{number}.safetensors", {"format": "pt"})
    weight_map = {name: f"{position % 2}.safetensors" for position, name in enumerate(names)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    require_final_norm()
    (folder / "1.safetensors").unlink()
    assert "1.safetensors" in refusal(*overrides)
    index.unlink()

    # A file of torch.save.
    incomplete = {name: tensor for name, tensor in tensors.items() if name not in removed}
    torch.save(incomplete, folder / "pytorch_model.bin")
    assert refusal(*overrides) == missing
    torch.save(tensors, folder / "pytorch_model.bin")
    require_final_norm()


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes))


def test_config_that_no_recipe_can_express_is_refused(model_folder, refusal):
    model = NATIVE["granitemoehybrid"]
    folder, _ = model_folder(*model)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    change_config(
        folder,
        rope_parameters=rope,
        hidden_act="gelu",
        embedding_multiplier=12,
        attention_multiplier=1.0,
        logits_scaling=6,
    )
    assert refusal(*model, f"initial={folder}").splitlines() == [
        f"initial: {key}: is {hf_value} in the folder's config.json, "
        f"but the recipe's model always has {value}; use another folder"
        for key, hf_value, value in (
            ("rope_type", "linear", "default"),
            ("hidden_act", "gelu", "silu"),
            ("embedding_multiplier", 12, 1.0),
            ("attention_multiplier", 1.0, 0.25),
            ("logits_scaling", 6, 1.0),
        )
    ]


def test_scaled_positions_of_llama_3_are_refused(model_folder, refusal):
    """Under the old name that Llama's config has for them."""
    model = stack({"full": FULL})
    folder, _ = model_folder(model)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 96,
    }
    change_config(folder, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    message = refusal(model, f"initial={folder}")
    assert "rope_type: is llama3 in the folder's config.json" in message


def residual_scales(block, half, value, hf_value):
    """Return the key of a block's residual scales, the recipe's value and the config's."""
    return f"layers.blocks.{block}.{half}_residual", value, hf_value


@pytest.mark.parametrize(
    ("name", "changes", "differences"),
    [
        (
            "granitemoehybrid",
            {"residual_multiplier": 0.22, "rms_norm_eps": 1e-6},
            [
                ("rms_norm_eps", 1e-5, 1e-6),
                residual_scales("m", "mixer", (1.0, 1.0), (1.0, 0.22)),
                residual_scales("m", "mlp", (1.0, 1.0), (1.0, 0.22)),
                residual_scales("full", "mixer", (1.0, 1.0), (1.0, 0.22)),
                residual_scales("full", "mlp", (1.0, 1.0), (1.0, 0.22)),
            ],
        ),
        (
            "minimax",
            {"linear_attn_alpha_factor": 3.0, "mlp_beta_factor": 0.5},
            [
                residual_scales("l", "mixer", (1.5, 0.5), (3.0, 0.5)),
                residual_scales("l", "mlp", (2.0, 0.7), (2.0, 0.5)),
                residual_scales("full", "mlp", (2.0, 0.7), (2.0, 0.5)),
            ],
        ),
        (
            "qwen3_5_text",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            [("layers.blocks.full.rotary_fraction", 0.25, 0.5)],
        ),
    ],
)
def test_differences_from_the_config_are_printed(
    model_folder, tiny_recipe, name, changes, differences
):
    folder, _ = model_folder(*NATIVE[name])
    change_config(folder, **changes)
    with imported(tiny_recipe, *NATIVE[name], f"initial={folder}") as (_, lines):
        assert lines == [
            f"starting from the weights of {folder}",
            *(
                f"model.{key}: {value}, but the weights were trained with {hf_value}"
                for key, value, hf_value in differences
            ),
        ]


def size_problem(key, hf_size, size):
    return (
        f"initial: {key}: is {hf_size} in the folder's config.json, "
        f"but {size} in the recipe's model; they must be the same"
    )


def test_experts_cannot_become_a_dense_mlp(model_folder, refusal):
    folder, _ = model_folder(*MORE_NATIVE["minimax, experts"])
    dense = stack({kind: {"mixer": kind, "norm": "post"} for kind in ("lightning", "full")})
    message = refusal(dense, "model.intermediate_size=48", f"initial={folder}")
    assert message.splitlines() == [
        size_problem("num_local_experts", 4, 1),
        size_problem("num_experts_per_tok", 2, 1),
    ]


def test_folders_are_refused_before_any_process_starts(
    model_folder, tiny_recipe, refusal, longspan, tmp_path
):
    full = stack({"full": FULL})
    folder, _ = model_folder(full)
    sizes = ["model.hidden_size=128", "model.num_key_value_heads=4", "model.head_dim=16"]
    training = longspan("train", tiny_recipe, full, f"initial={folder}", *sizes)
    assert training.returncode == 2
    assert not (tmp_path / "run").exists()
    assert training.stderr.splitlines() == [
        f"longspan: {size_problem('hidden_size', 64, 128)}",
        f"longspan: {size_problem('num_key_value_heads', 2, 4)}",
    ]

    nowhere = tmp_path / "nowhere"
    assert refusal(full, f"initial={nowhere}") == (
        f"initial: {nowhere}/config.json: No such file or directory; "
        "set initial to the folder of a Hugging Face model"
    )
    assert refusal(full, f"initial={{path: {folder}, new: [nothing.like.it]}}") == (
        "initial.new: nothing.like.it matches none of the 0 new parameters; remove it"
    )

    change_config(folder, model_type="mamba")
    message = refusal(full, f"initial={folder}")
    assert "has the architecture mamba; use a model of one of these: llama, mistral" in message
    (folder / "config.json").write_text("{")
    message = refusal(full, f"initial={folder}")
    assert "is not the config of a Hugging Face model" in message
