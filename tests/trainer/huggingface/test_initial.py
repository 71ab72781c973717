"""Models that come back from transformers: as they left, with changed layers, on several ranks, and what is refused."""

import contextlib
import json
import re
import shutil

import pytest
import torch
from longspan.launch.process import process_group
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe

from .exported import FULL, MORE_NATIVE, NATIVE, S2, default, save_run, stack, wide


@pytest.fixture
def model_folder(tiny_recipe, tmp_path):
    """``model_folder(*overrides)``: a Hugging Face folder of a run whose weights are noise, and these weights."""

    def make(*overrides):
        from longspan.trainer.huggingface.export import export_run
        from longspan.trainer.huggingface.saved_run import SavedRun

        run = save_run(tiny_recipe, *overrides)
        with process_group(2):
            export_run(str(run), tmp_path / "model", None, lambda line: None)
        saved = SavedRun(str(run))
        weights = saved.weights(list(saved.shapes))
        shutil.rmtree(run)
        return tmp_path / "model", weights

    return make


@contextlib.contextmanager
def begun(recipe_file, *overrides):
    """An engine with the weights that its recipe begins with; ``told`` has what is told of them."""
    from longspan.trainer.engines.build import build_engine
    from longspan.trainer.huggingface.initial import load_initial, require_initial
    from longspan.trainer.ranks import RankGroup

    recipe = load_recipe(str(recipe_file), ["training.seq_length=192", *overrides])
    require_initial(recipe)
    with process_group(2), contextlib.closing(build_engine(recipe)) as engine:
        engine.told = load_initial(engine, recipe, RankGroup())
        yield engine


@pytest.mark.parametrize(("name", "overrides"), default(NATIVE) + wide(MORE_NATIVE))
def test_what_left_comes_back(model_folder, tiny_recipe, name, overrides):
    folder, before = model_folder(*overrides)
    with begun(tiny_recipe, *overrides, f"initial={folder}") as engine:
        after = engine.weights()
    assert engine.told == [f"begins with the weights of {folder}"]
    assert before.keys() == after.keys()
    for key, weight in before.items():
        rows = (
            257 if "word_embeddings" in key or "output_layer" in key else len(weight)
        )  # without the padding
        assert torch.allclose(after[key][:rows], weight[:rows], rtol=0, atol=1e-6), key


def test_a_llama_goes_on_with_sparse_layers(model_folder, tiny_recipe):
    """Its weights under another pattern, longer context and rotary base; what it has not must be named."""
    folder, before = model_folder(stack({"full": FULL}))
    sparse = [
        stack({"s2": {**S2, "qk_norm": True}, "full": FULL}, ["s2", "full", "full", "full"]),
        "model.rope_theta=50000.0",
    ]
    where = f"initial={folder}"
    missing = "decoder.layers.0.mixer.k_layernorm.weight, decoder.layers.0.mixer.q_layernorm.weight"
    message = re.escape(
        f"the folder's model has no {missing}; if that is meant, name them in initial.new"
    )
    with pytest.raises(UserError, match=message), begun(tiny_recipe, *sparse, where):
        pass
    allowed = f'initial={{path: {folder}, new: ["decoder.layers.0.mixer.?_layernorm.weight"]}}'
    with begun(tiny_recipe, *sparse, allowed) as engine:
        after = engine.weights()
        assert torch.equal(after.pop("decoder.layers.0.mixer.q_layernorm.weight"), torch.ones(16))
        assert torch.equal(after.pop("decoder.layers.0.mixer.k_layernorm.weight"), torch.ones(16))
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key][:257], before[key][:257]) for key in before)


def test_layers_that_become_linear_begin_anew(model_folder, tiny_recipe):
    folder, before = model_folder(stack({"full": FULL}))
    lines = [stack({"l": {"mixer": "lightning"}, "full": FULL}), "training.seed=5"]
    named = 'new: ["decoder.layers.[02].mixer.*"], unused: ["model.layers.[02].self_attn.*"]'
    message = r"(?s)has no decoder.layers.\*.mixer.*norm.weight \(2 of them\);.*\n.*has no place for model.layers.\*.self_attn"
    with pytest.raises(UserError, match=message), begun(tiny_recipe, *lines, f"initial={folder}"):
        pass
    with begun(tiny_recipe, *lines, f"initial={{path: {folder}, {named}}}") as engine:
        after = engine.weights()
    kept = [
        key for key in before if key in after and ".0.mixer." not in key and ".2.mixer." not in key
    ]
    assert len(kept) > 20
    assert all(torch.equal(after[key][:257], before[key][:257]) for key in kept)


@pytest.mark.parametrize("degree", ["tp", pytest.param("pp", marks=pytest.mark.wide)])
def test_ranks_begin_with_the_same_model(model_folder, tiny_recipe, longspan, tmp_path, degree):
    """And once they have, the folder may go."""
    folder, _ = model_folder(stack({"full": FULL}))
    options = [
        stack({"s2": S2}),
        f"initial={folder}",
        "metrics.log_interval=1",
        "model.rope_theta=50000.0",
    ]

    def losses(*more):
        done = longspan("train", tiny_recipe, *options, *more)
        assert done.returncode == 0, done.stderr
        records = [
            json.loads(line)
            for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        return done.stdout, [record["train/loss"] for record in records if "train/loss" in record]

    said, alone = losses("training.steps=2")
    assert (
        f"begins with the weights of {folder}\nmodel.rope_theta: 50000.0, the weights were trained with 10000.0\n"
        in said
    )
    shutil.rmtree(tmp_path / "run")
    _, shared = losses("training.steps=2", f"parallel.{degree}=2", "launch.processes=2")
    assert shared == pytest.approx(alone, rel=1e-5)
    assert alone[0] > 6  # of noise; the recipe's own weights begin at 5.6
    shutil.rmtree(folder)
    said, longer = losses("training.steps=3")
    assert "begins with" not in said
    assert len(longer) == 3


@pytest.fixture
def refused(tiny_recipe):
    """``refused(*overrides)``: why a run does not begin, before any process starts."""
    from longspan.trainer.huggingface.initial import require_initial

    def ask(*overrides):
        with pytest.raises(UserError) as caught:
            require_initial(load_recipe(str(tiny_recipe), ["training.seq_length=192", *overrides]))
        return str(caught.value)

    return ask


def test_files_are_those_of_the_config(model_folder, tiny_recipe, refused):
    """Whether they are safetensors, in one file or several, or not."""
    from safetensors.torch import load_file, save_file

    full = stack({"full": FULL})
    folder, before = model_folder(full, "model.tie_word_embeddings=false")
    lines = [full, "model.tie_word_embeddings=false", f"initial={folder}"]
    tensors = load_file(folder / "model.safetensors")

    def write(change, remove=()):
        kept = {name: tensor for name, tensor in (tensors | change).items() if name not in remove}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    lost = [
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]
    write({}, lost)
    missing = (
        "lm_head.weight, model.layers.*.mlp.up_proj.weight (2 of them): not in the folder's files"
    )
    assert refused(*lines) == f"initial: {missing}"
    bias = "model.layers.3.self_attn.q_proj.bias"
    write({bias: torch.ones(64)})
    assert f"the recipe's model has no place for {bias}; if that is meant" in refused(*lines)
    with begun(tiny_recipe, *lines[:-1], f"initial={{path: {folder}, unused: [{bias}]}}"):
        pass
    write({"model.norm.weight": torch.ones(63)})
    assert (
        refused(*lines)
        == f"initial: {folder}: model.norm.weight: [63] in its files, [64] by its config.json"
    )
    write({})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert refused(*lines).startswith(f"initial: {folder}: transformers cannot load it: ")

    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name] for name in some},
            folder / f"{number}.safetensors",
            {"format": "pt"},
        )
    places = {name: f"{place % 2}.safetensors" for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    with begun(tiny_recipe, *lines) as engine:
        assert torch.equal(
            engine.weights()["decoder.final_layernorm.weight"],
            before["decoder.final_layernorm.weight"],
        )
    (folder / "1.safetensors").unlink()
    assert "1.safetensors" in refused(*lines)
    (folder / "model.safetensors.index.json").unlink()

    torch.save(
        {name: tensor for name, tensor in tensors.items() if name not in lost},
        folder / "pytorch_model.bin",
    )
    assert refused(*lines) == f"initial: {missing}"
    torch.save(tensors, folder / "pytorch_model.bin")
    with begun(tiny_recipe, *lines) as engine:
        assert torch.equal(
            engine.weights()["decoder.final_layernorm.weight"],
            before["decoder.final_layernorm.weight"],
        )


def _change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_what_no_recipe_says_is_refused(model_folder, refused):
    model = NATIVE["granitemoehybrid"]
    folder, _ = model_folder(*model)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    _change(
        folder,
        rope_parameters=rope,
        hidden_act="gelu",
        embedding_multiplier=12,
        attention_multiplier=1.0,
        logits_scaling=6,
    )
    assert refused(*model, f"initial={folder}").splitlines() == [
        f"initial: {key}: is {theirs} in the folder's config.json; the recipe's model has {ours}, and no key for another; "
        "begin with another folder"
        for key, theirs, ours in (
            ("rope_type", "linear", "default"),
            ("hidden_act", "gelu", "silu"),
            ("embedding_multiplier", 12, 1.0),
            ("attention_multiplier", 1.0, 0.25),
            ("logits_scaling", 6, 1.0),
        )
    ]


def test_the_scaled_positions_of_llama_3_are_refused(model_folder, refused):
    """As its config has them, under their old name."""
    model = stack({"full": FULL})
    folder, _ = model_folder(model)
    more = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 96,
    }
    _change(
        folder, rope_parameters=None, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **more}
    )
    assert "rope_type: is llama3 in the folder's config.json" in refused(model, f"initial={folder}")


@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        (
            "granitemoehybrid",
            {"residual_multiplier": 0.22, "rms_norm_eps": 1e-6},
            ["rms_norm_eps: 1e-05, the weights were trained with 1e-06"]
            + [
                f"layers.blocks.{name}.{half}_residual: (1.0, 1.0), the weights were trained with (1.0, 0.22)"
                for name in ("m", "full")
                for half in ("mixer", "mlp")
            ],
        ),
        (
            "minimax",
            {"linear_attn_alpha_factor": 3.0, "mlp_beta_factor": 0.5},
            [
                "layers.blocks.l.mixer_residual: (1.5, 0.5), the weights were trained with (3.0, 0.5)",
                "layers.blocks.l.mlp_residual: (2.0, 0.7), the weights were trained with (2.0, 0.5)",
                "layers.blocks.full.mlp_residual: (2.0, 0.7), the weights were trained with (2.0, 0.5)",
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
            ["layers.blocks.full.rotary_fraction: 0.25, the weights were trained with 0.5"],
        ),
    ],
)
def test_what_a_recipe_says_otherwise_is_told(model_folder, tiny_recipe, name, keys, told):
    folder, _ = model_folder(*NATIVE[name])
    _change(folder, **keys)
    with begun(tiny_recipe, *NATIVE[name], f"initial={folder}") as engine:
        assert engine.told == [
            f"begins with the weights of {folder}",
            *(f"model.{line}" for line in told),
        ]


def test_the_first_of_several_experts_is_no_dense_mlp(model_folder, refused):
    folder, _ = model_folder(*MORE_NATIVE["minimax, experts"])
    dense = stack({kind: {"mixer": kind, "norm": "post"} for kind in ("lightning", "full")})
    assert refused(dense, "model.intermediate_size=48", f"initial={folder}").splitlines() == [
        "initial: num_local_experts: is 4 in the folder's config.json, 1 in the recipe's model",
        "initial: num_experts_per_tok: is 2 in the folder's config.json, 1 in the recipe's model",
    ]


def test_what_cannot_be_begun_with_is_told_before_any_process_starts(
    model_folder, tiny_recipe, refused, longspan, tmp_path
):
    full = stack({"full": FULL})
    folder, _ = model_folder(full)
    sizes = ["model.hidden_size=128", "model.num_key_value_heads=4", "model.head_dim=16"]
    done = longspan("train", tiny_recipe, full, f"initial={folder}", *sizes)
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()
    assert done.stderr.splitlines() == [
        "longspan: initial: hidden_size: is 64 in the folder's config.json, 128 in the recipe's model",
        "longspan: initial: num_key_value_heads: is 2 in the folder's config.json, 4 in the recipe's model",
    ]

    nowhere, what = tmp_path / "nowhere", "name the folder of a Hugging Face model"
    assert (
        refused(full, f"initial={nowhere}")
        == f"initial: {nowhere}/config.json: No such file or directory; {what}"
    )
    unknown = refused(full, f"initial={{path: {folder}, new: [nothing.like.it]}}")
    assert unknown == "initial.new: nothing.like.it names nothing of 0 such parameters; remove it"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "is of architecture mamba; known are llama, mistral" in refused(
        full, f"initial={folder}"
    )
    (folder / "config.json").write_text("{")
    assert "is not the config of a Hugging Face model" in refused(full, f"initial={folder}")
