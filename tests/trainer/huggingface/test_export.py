"""Models that leave for transformers: every architecture, our own code and its cache, and what must not be written."""

import json
import re
import resource
import shutil
from functools import partial

import pytest
import torch
from longspan.launch.process import process_group
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe

from .exported import (
    CUSTOM,
    FULL,
    MORE_CUSTOM,
    MORE_NATIVE,
    NATIVE,
    S2,
    WIDE,
    WINDOW,
    default,
    save_run,
    stack,
    wide,
)


@pytest.fixture
def saved_run(tiny_recipe):
    return partial(save_run, tiny_recipe)


def exported(run, out, **options):
    """The model as a user loads it, in fp32, and what the check found."""
    from longspan.trainer.huggingface import export
    from transformers import AutoModelForCausalLM

    said, found = [], []
    with process_group(2), pytest.MonkeyPatch.context() as patch:
        real = export.check_export
        patch.setattr(
            export, "check_export", lambda *arguments: found.append(real(*arguments)) or found[0]
        )
        export.export_run(str(run), out, options.pop("dtype", None), said.append)
    return (
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options).eval(),
        found[0],
        said,
    )


@pytest.mark.parametrize(("name", "overrides"), default(NATIVE) + wide(MORE_NATIVE))
def test_native_architectures_need_no_code_of_ours(saved_run, tmp_path, name, overrides):
    model, found, _ = exported(saved_run(*overrides), tmp_path / "out")
    assert model.config.model_type == name.split(",")[0]
    assert not list((tmp_path / "out").glob("*.py"))
    assert found.whole < 2e-5
    assert found.cached < 2e-5
    assert found.greedy == 72


def _rates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(("rate_log", "A_log"))
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_decay_rates_stay_fp32_in_memory(saved_run, tmp_path, dtype):
    """In the code that goes with a model: as the folder says, and as the caller says."""
    from transformers import AutoModelForCausalLM

    run = saved_run(stack({"d": {"mixer": "gated_deltanet"}, "k": {"mixer": "kda"}}))
    wanted = _rates(exported(run, tmp_path / "out", dtype="bfloat16", trust_remote_code=True)[0])
    options = {"dtype": dtype} if dtype else {}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, **options
    )
    rates = _rates(model)
    assert len(rates) == 4
    assert all(torch.equal(rates[name], rate) for name, rate in wanted.items())
    others = {parameter.dtype for name, parameter in model.named_parameters() if name not in rates}
    assert others == {dtype or torch.bfloat16}
    assert model(torch.arange(9)[None]).logits.dtype == (dtype or torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "class_name", "loaded_dtype"),
    [
        ("qwen3_5_text", "Qwen3_5ForCausalLM", torch.bfloat16),
        ("olmo_hybrid", "OlmoHybridForCausalLM", torch.float32),
        ("granitemoehybrid", "GraniteMoeHybridForCausalLM", torch.bfloat16),
    ],
)
def test_classes_of_transformers_can_be_told_to_keep_rates(
    saved_run, tmp_path, monkeypatch, name, class_name, loaded_dtype
):
    """As docs/exporting.md says: without it two of them round what the file has in fp32."""
    import transformers

    auto = transformers.AutoModelForCausalLM
    wanted = _rates(exported(saved_run(*NATIVE[name]), tmp_path / "out", dtype="bfloat16")[0])
    rounded = _rates(auto.from_pretrained(tmp_path / "out"))
    assert {rate.dtype for rate in rounded.values()} == {loaded_dtype}
    monkeypatch.setattr(
        getattr(transformers, class_name), "_keep_in_fp32_modules_strict", ["A_log"]
    )
    model = auto.from_pretrained(tmp_path / "out")
    rates = _rates(model)
    assert rates
    assert all(torch.equal(rates[key], rate) for key, rate in wanted.items())
    assert model(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("name", "overrides"), default(CUSTOM) + wide(MORE_CUSTOM))
def test_code_of_ours_does_whatever_a_recipe_says(saved_run, tmp_path, name, overrides):
    model, found, _ = exported(saved_run(*overrides), tmp_path / "out", trust_remote_code=True)
    assert model.config.model_type == "longspan"
    assert found.whole < 2e-5
    assert found.cached < 2e-5
    _padding_changes_nothing(model)
    _chunks_change_nothing(model)
    _beams_are_those_without_a_cache(model)


def _padding_changes_nothing(model):
    """On the left, rows of several lengths; whole prompts and what follows from the cache."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(256, (count,), generator=generator) for count in (150, 61, 3)]
    padded, mask = torch.full((3, 150), 7), torch.zeros(3, 150, dtype=torch.long)
    for row, tokens in enumerate(rows):
        padded[row, 150 - len(tokens) :], mask[row, 150 - len(tokens) :] = tokens, 1
    more = torch.randint(256, (3, 40), generator=generator)
    with torch.no_grad():
        outputs = model(padded, attention_mask=mask)
        found = [outputs.logits]
        for place in range(more.shape[1]):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            outputs = model(
                more[:, place : place + 1],
                attention_mask=mask,
                past_key_values=outputs.past_key_values,
            )
            found.append(outputs.logits)
        found = torch.cat(found, 1)
        for row, tokens in enumerate(rows):
            alone = model(torch.cat([tokens, more[row]])[None], use_cache=False).logits[0]
            assert (found[row, 150 - len(tokens) :] - alone).abs().max() < 2e-5 * alone.abs().max()


def _chunks_change_nothing(model):
    tokens = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole, cache, found = model(tokens, use_cache=False).logits, None, []
        for part in tokens.split([70, 1, 64, 15], 1):
            outputs = model(part, past_key_values=cache)
            cache = outputs.past_key_values
            found.append(outputs.logits)
    assert (torch.cat(found, 1) - whole).abs().max() < 2e-5 * whole.abs().max()


def _beams_are_those_without_a_cache(model):
    tokens = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(4))
    options = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": 12,
        "num_beams": 3,
        "do_sample": False,
    }
    cached, anew = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew)


def test_the_cache_keeps_what_patterns_still_see(saved_run, tmp_path):
    """As many numbers as the recipe's model is reckoned to keep."""
    from longspan.trainer.predict.flops import state_bytes

    blocks = {
        "s2": S2,
        "window": WINDOW,
        "streaming": {"mixer": "streaming", "sinks": 3, "window": 20},
        "full": FULL,
    }
    run = saved_run(stack(blocks))
    model, _, _ = exported(run, tmp_path / "out", trust_remote_code=True)
    recipe = load_recipe(str(run / "recipe.yaml"), [])
    for length in (64, 113, 190):
        with torch.no_grad():
            cache = model(torch.zeros(1, length, dtype=torch.long)).past_key_values
        for layer, state in enumerate(cache.states):
            kept = sum(tensor.numel() for name, tensor in state.items() if name[0] in "kv")
            # From its query on: one key of each head of a window has left, that the last query saw.
            reckoned = (
                state_bytes(recipe.model, length + 1, layer, element=1)
                - 2 * recipe.model.kv_heads * 16
            )
            assert kept == reckoned, f"layer {layer} after {length} tokens"


def test_a_bf16_export_is_as_exact(saved_run, tmp_path):
    _, found, _ = exported(saved_run(*NATIVE["qwen3_5_text"]), tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert found.whole < 2e-5


def test_its_tokenizer_is_the_recipes(saved_run, tmp_path):
    from longspan.trainer.data.tokenizer import ByteTokenizer
    from transformers import AutoTokenizer

    run = saved_run(*NATIVE["llama"])
    exported(run, tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), ByteTokenizer()
    for text in ("def f(x):\n\treturn x  # naïve — 漢字 🙂\r\n", " a  b", "\x00\x7f"):
        assert theirs(text).input_ids == ours.encode(text.encode())
        assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == ours.end_of_document
    assert theirs.padding_side == "left"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained for 3 steps, 100 tokens" in card
    assert "mixer: full" in card


def test_what_differs_is_not_written(saved_run, tmp_path, monkeypatch):
    """The check sees two rows that changed places in one of a layer's matrices."""
    from longspan.trainer.huggingface import naming

    run, real = saved_run(*NATIVE["llama"]), naming.softmax

    def swapped(model, layer, *gates):
        for tensor_map in real(model, layer, *gates):
            for rows in tensor_map.hf_rows.values():
                if rows is not None and layer == 1:
                    rows[[0, 1]] = rows[[1, 0]]
            yield tensor_map

    monkeypatch.setattr(naming, "softmax", swapped)
    with pytest.raises(UserError, match=r"logits differ by|greedy text differs"):
        exported(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_bad_input_leaves_nothing_behind(saved_run, tmp_path):
    run = saved_run(*NATIVE["llama"])

    def refused(source, out, message):
        with pytest.raises(UserError, match=re.escape(message)):
            exported(source, out)
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    before = sorted(path.name for path in tmp_path.iterdir())
    refused(f"{run}@5", tmp_path / "out", "has no checkpoint of step 5; there are 3")
    refused(f"{run}@x", tmp_path / "out", f"{run}@x: not the folder of a run")
    refused(run, run, "exists already; remove it or choose another folder")
    damaged = next((run / "checkpoints" / "step-00000003").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    refused(run, tmp_path / "out", "choose another with")
    shutil.rmtree(run / "checkpoints")
    refused(run, tmp_path / "out", "has no checkpoint yet")


def test_a_full_disk_leaves_nothing_behind(saved_run, tmp_path):
    run = saved_run(*NATIVE["llama"])
    before, limit = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(
            UserError, match=f"{tmp_path / 'out'}: cannot be written: .*File too large"
        ):
            exported(run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_is_not_that_of_the_run(saved_run, tmp_path):
    """Or not whole: one message, whatever torch and transformers raise of it."""
    from longspan.trainer.huggingface.check import check_export
    from longspan.trainer.huggingface.saved_run import SavedRun
    from safetensors.torch import load_file, save_file

    run, out = saved_run(stack({"full": FULL})), tmp_path / "out"
    exported(run, out)

    def refused(other=run):
        with process_group(2), pytest.raises(UserError) as caught:
            check_export(out, SavedRun(str(other)), lambda line: None)
        return str(caught.value)

    def another(name, *overrides):
        return saved_run(f"run_dir={tmp_path / name}", *overrides)

    of = f"{tmp_path}/{{}} at step 3"
    found = refused(another("words", stack({"full": FULL}), "model.vocab_size=300"))
    assert found == f"{out}: has a vocabulary of 257, {of.format('words')} has one of 300"
    found = refused(another("window", stack({"w": WINDOW})))
    assert (
        found == f"{out}: is a model of architecture llama; {of.format('window')} becomes mistral"
    )
    assert "chooses its keys from the content" in refused(
        another("moba", stack({"m": {"mixer": "moba"}}))
    )
    found = refused(
        another(
            "larger", stack({"full": FULL}), "model.hidden_size=128", "model.num_hidden_layers=2"
        )
    )
    assert "whole prompts, logits differ by" in found or "greedy text differs" in found

    file = out / "model.safetensors"
    tensors = load_file(file)
    cut, lost = (
        tensors["model.norm.weight"][:63].clone(),
        tensors.pop("model.layers.2.mlp.up_proj.weight"),
    )
    save_file({**tensors, "model.layers.2.mlp.up_proj.bias": lost}, file, {"format": "pt"})
    assert (
        "do not agree on model.layers.2.mlp.up_proj.bias, model.layers.2.mlp.up_proj.weight"
        in refused()
    )
    save_file({**tensors, "model.norm.weight": cut}, file, {"format": "pt"})
    assert refused() == f"{out}: model.norm.weight: [63] in its files, [64] by its config.json"
    file.write_bytes(file.read_bytes()[:-100])
    assert refused().startswith(f"{out}: transformers cannot load it: ")


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("llama-1.3b", 1024),
        ("masformer-1.3b", 2048),
        ("s2-llama-1.3b", 2048),
        ("s2-llama-7b", 4096),
        ("phi-3-small", 2048),
        ("samba-1.3b", 4096),
        ("s2-llama-1.3b-tiny", 512),
    ],
)
def test_prompts_of_the_check_are_longer_than_windows(name, length):
    from longspan.trainer.huggingface.check import prompt_length
    from longspan.trainer.huggingface.model_to_export import ModelToExport

    recipe = load_recipe(name, [])
    assert (
        prompt_length(
            ModelToExport(recipe.model, recipe.model.vocab_size, recipe.training.seq_length)
        )
        == length
    )


def test_a_step_is_a_number_behind_the_last_at(saved_run, tmp_path):
    from longspan.trainer.huggingface.saved_run import SavedRun

    run = saved_run(*NATIVE["llama"]).rename(tmp_path / "lr@1e-3")
    assert [SavedRun(f"{run}{step}").folder.path for step in ("", "@3")] == [run, run]
    with pytest.raises(UserError, match=f"{run}: has no checkpoint of step 4; there are 3"):
        SavedRun(f"{run}@4")
    run = run.rename(tmp_path / "lr@3")
    assert SavedRun(f"{run}/").folder.path == run


def test_what_chooses_its_keys_stays_here(saved_run, tmp_path, longspan, tiny_recipe):
    moba = stack({"moba": {"mixer": "moba", "block": 8, "top_k": 2}})
    with pytest.raises(
        UserError, match=r"model.layers.blocks.moba: moba chooses its keys from the content"
    ):
        exported(saved_run(moba), tmp_path / "out")
    dry = longspan("train", tiny_recipe, moba, "--dry-run")
    assert "longspan export  refuses: model.layers.blocks.moba" in dry.stdout


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (NATIVE["minimax"], "writes minimax, an architecture of transformers"),
        (["model.rms_norm_eps=1e-5"], "no architecture of transformers has these layers together"),
        (
            [*NATIVE["minimax"][:-1]],
            "minimax cannot express rms_norm_eps: 1e-05 (its lightning layers have 1e-6)",
        ),
    ],
    ids=["native", "mixed", "nearly"],
)
def test_a_dry_run_says_what_it_exports_as(tiny_recipe, overrides, line):
    from longspan.trainer.huggingface.model_to_export import ModelToExport
    from longspan.trainer.huggingface.registry import describe_target

    recipe = load_recipe(str(tiny_recipe), overrides)
    assert line in describe_target(ModelToExport(recipe.model, 257, 96))


@pytest.mark.parametrize(
    ("model", "ranks"),
    [
        pytest.param("ministral", ["parallel.tp=2", "parallel.sequence_parallel=true"], id="tp"),
        pytest.param("minimax", ["parallel.pp=2"], id="pp", marks=WIDE),
        pytest.param("minimax, experts", ["parallel.cp=2", "parallel.ep=2"], id="ep", marks=WIDE),
        pytest.param(
            "qwen3_5_text",
            ["engine.name=deepspeed", "engine.zero_stage=3"],
            id="zero-3",
            marks=WIDE,
        ),
    ],
)
def test_from_ranks_to_transformers(longspan, tiny_recipe, tmp_path, model, ranks):
    """As a user does it: a run on two ranks, its model out, and compared again."""
    stack = {**NATIVE, **MORE_NATIVE}[model]
    trained = longspan(
        "train", tiny_recipe, "launch.processes=2", "training.steps=4", *ranks, *stack
    )
    assert trained.returncode == 0, trained.stderr
    run, out = tmp_path / "run", tmp_path / "model"
    done = longspan("export", run, out)
    assert done.returncode == 0, done.stderr
    assert f"writes {model.partition(',')[0]}" in done.stdout
    again = longspan("check-export", out, f"{run}@4")
    assert again.returncode == 0, again.stderr
    assert "72 tokens of greedy text are the same" in again.stdout
    wrong = longspan("check-export", tmp_path, run)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"longspan: {tmp_path}: has no config.json; name the folder that longspan export wrote\n",
    )
