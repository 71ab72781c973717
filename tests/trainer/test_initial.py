"""Models that come back from transformers: as they left, with changed layers, on several ranks, and what is refused."""

import contextlib
import json
import re
import shutil

import pytest
import torch
from longspan.launch.process import process_group
from longspan.trainer.errors import UserError
from longspan.trainer.recipe_file import load_recipe

from .exported import FULL, MORE_NATIVE, NATIVE, S2, default, save_run, stack, wide


@pytest.fixture
def model_folder(tiny_recipe, tmp_path):
    """``model_folder(*overrides)``: a Hugging Face folder of a run whose weights are noise, and these weights."""

    def make(*overrides):
        from longspan.trainer.export.export import export_run
        from longspan.trainer.export.source import SavedRun

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
    """An engine with the weights that its recipe begins with."""
    from longspan.trainer.control import Control
    from longspan.trainer.initial import load_initial, require_initial
    from longspan.trainer.loop import build_engine

    recipe = load_recipe(str(recipe_file), ["training.seq_length=192", *overrides])
    require_initial(recipe)
    with process_group(2), contextlib.closing(build_engine(recipe)) as engine:
        load_initial(engine, recipe, Control())
        yield engine


@pytest.mark.parametrize(("name", "overrides"), default(NATIVE) + wide(MORE_NATIVE))
def test_what_left_comes_back(model_folder, tiny_recipe, name, overrides):
    folder, before = model_folder(*overrides)
    with begun(tiny_recipe, *overrides, f"initial={folder}") as engine:
        after = engine.weights()
    assert before.keys() == after.keys()
    for key, weight in before.items():
        rows = 257 if "word_embeddings" in key or "output_layer" in key else len(weight)  # without the padding
        assert torch.allclose(after[key][:rows], weight[:rows], rtol=0, atol=1e-6), key


def test_a_llama_goes_on_with_sparse_layers(model_folder, tiny_recipe):
    """Its weights under another pattern, longer context and rotary base; what it has not must be named."""
    folder, before = model_folder(stack({"full": FULL}))
    sparse = [stack({"s2": {**S2, "qk_norm": True}, "full": FULL}, ["s2", "full", "full", "full"]), "model.rope_theta=50000.0"]
    where = f"initial={folder}"
    missing = "decoder.layers.0.mixer.k_layernorm.weight, decoder.layers.0.mixer.q_layernorm.weight"
    message = re.escape(f"the folder's model has no {missing}; if that is meant, name them in initial.new")
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
    message = r"(?s)has no decoder.layers.0.mixer.*\n.*has no place for model.layers.0.self_attn"
    with pytest.raises(UserError, match=message), begun(tiny_recipe, *lines, f"initial={folder}"):
        pass
    with begun(tiny_recipe, *lines, f"initial={{path: {folder}, {named}}}") as engine:
        after = engine.weights()
    kept = [key for key in before if key in after and ".0.mixer." not in key and ".2.mixer." not in key]
    assert len(kept) > 20
    assert all(torch.equal(after[key][:257], before[key][:257]) for key in kept)


@pytest.mark.parametrize("degree", ["tp", pytest.param("pp", marks=pytest.mark.wide)])
def test_ranks_begin_with_the_same_model(model_folder, tiny_recipe, longspan, tmp_path, degree):
    """And once they have, the folder may go."""
    folder, _ = model_folder(stack({"full": FULL}))
    options = [stack({"s2": S2}), f"initial={folder}", "metrics.log_interval=1"]

    def losses(*more):
        done = longspan("train", tiny_recipe, *options, *more)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return done.stdout, [record["train/loss"] for record in records if "train/loss" in record]

    said, alone = losses("training.steps=2")
    assert f"begins with the weights of {folder}" in said
    shutil.rmtree(tmp_path / "run")
    _, shared = losses("training.steps=2", f"parallel.{degree}=2", "launch.processes=2")
    assert shared == pytest.approx(alone, rel=1e-5)
    assert alone[0] > 6  # of noise; the recipe's own weights begin at 5.6
    shutil.rmtree(folder)
    said, longer = losses("training.steps=3")
    assert "begins with" not in said
    assert len(longer) == 3


def test_what_cannot_be_begun_with_is_told_before_any_process_starts(model_folder, tiny_recipe, longspan, tmp_path):
    folder, _ = model_folder(stack({"full": FULL}))
    sizes = ["model.hidden_size=128", "model.num_key_value_heads=4", "model.head_dim=16"]
    done = longspan("train", tiny_recipe, stack({"full": FULL}), f"initial={folder}", *sizes)
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()
    assert done.stderr.splitlines() == [
        "longspan: initial: hidden_size: is 64 in the folder's config.json, 128 in the recipe's model",
        "longspan: initial: num_key_value_heads: is 2 in the folder's config.json, 4 in the recipe's model",
    ]

    def refused(initial):
        with pytest.raises(UserError) as caught, begun(tiny_recipe, stack({"full": FULL}), f"initial={initial}"):
            pass
        return str(caught.value)

    nowhere, what = tmp_path / "nowhere", "name the folder of a Hugging Face model"
    assert refused(nowhere) == f"initial: {nowhere}/config.json: No such file or directory; {what}"
    unknown = refused(f"{{path: {folder}, new: [nothing.like.it]}}")
    assert unknown == "initial.new: nothing.like.it names nothing of 0 such parameters; remove it"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "is of architecture mamba; known are llama, mistral" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "is not the config of a Hugging Face model" in refused(folder)
