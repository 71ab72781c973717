"""Models exported to transformers: every architecture, custom code and its cache, and refusals."""

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
    default_cases,
    save_run,
    stack,
    wide_cases,
)


@pytest.fixture
def saved_run(tiny_recipe):
    return partial(save_run, tiny_recipe)


def exported(run, out, dtype=None, **options):
    """Export a run.

    Returns:
        The model as a user loads it, in fp32, and the result of the check.
    """
    from longspan.trainer.huggingface import export
    from transformers import AutoModelForCausalLM

    results = []
    check_export = export.check_export

    def recorded_check(*arguments):
        results.append(check_export(*arguments))
        return results[0]

    with process_group(2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "check_export", recorded_check)
        export.export_run(str(run), out, dtype, lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options).eval()
    return model, results[0]


@pytest.mark.parametrize(("name", "overrides"), default_cases(NATIVE) + wide_cases(MORE_NATIVE))
def test_native_architectures_need_no_custom_code(saved_run, tmp_path, name, overrides):
    model, result = exported(saved_run(*overrides), tmp_path / "out")

    assert model.config.model_type == name.split(",")[0]
    assert not list((tmp_path / "out").glob("*.py"))
    assert result.whole < 2e-5
    assert result.cached < 2e-5
    assert result.greedy == 72


def _rates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(("rate_log", "A_log"))
    }


@pytest.mark.parametrize(
    "dtype",
    [
        None,
        *(pytest.param(each, marks=pytest.mark.wide) for each in (torch.bfloat16, torch.float16)),
    ],
)
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


@pytest.mark.parametrize(("name", "overrides"), default_cases(CUSTOM) + wide_cases(MORE_CUSTOM))
def test_custom_code_computes_any_stack(saved_run, tmp_path, name, overrides):
    model, result = exported(saved_run(*overrides), tmp_path / "out", trust_remote_code=True)

    assert model.config.model_type == "longspan"
    assert result.whole < 2e-5
    assert result.cached < 2e-5
    _require_padding_changes_nothing(model)
    _require_chunks_change_nothing(model)
    _require_beams_need_no_cache(model)


def _require_padding_changes_nothing(model):
    """Sequences of several lengths, padded on the left, and what follows them from the cache."""
    length = 150
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(256, (count,), generator=generator) for count in (length, 61, 3)]
    padded = torch.full((3, length), 7)
    mask = torch.zeros(3, length, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        padded[index, length - len(prompt) :] = prompt
        mask[index, length - len(prompt) :] = 1
    continuation = torch.randint(256, (3, 40), generator=generator)

    with torch.no_grad():
        outputs = model(padded, attention_mask=mask)
        logits = [outputs.logits]
        for position in range(continuation.shape[1]):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            outputs = model(
                continuation[:, position : position + 1],
                attention_mask=mask,
                past_key_values=outputs.past_key_values,
            )
            logits.append(outputs.logits)
        batched = torch.cat(logits, 1)

        for index, prompt in enumerate(prompts):
            tokens = torch.cat([prompt, continuation[index]])
            alone = model(tokens[None], use_cache=False).logits[0]
            difference = (batched[index, length - len(prompt) :] - alone).abs().max()
            assert difference < 2e-5 * alone.abs().max()


def _require_chunks_change_nothing(model):
    tokens = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = None
        logits = []
        for chunk in tokens.split([70, 1, 64, 15], 1):
            outputs = model(chunk, past_key_values=cache)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    assert (torch.cat(logits, 1) - whole).abs().max() < 2e-5 * whole.abs().max()


def _require_beams_need_no_cache(model):
    tokens = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(4))
    options = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": 12,
        "num_beams": 3,
        "do_sample": False,
    }
    with_cache = model.generate(tokens, use_cache=True, **options)
    without_cache = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(with_cache, without_cache)


def test_cache_keeps_only_keys_that_patterns_still_see(saved_run, tmp_path):
    """The cache has as many numbers as the recipe's model is predicted to keep."""
    from longspan.trainer.predict.flops import state_bytes

    blocks = {
        "s2": S2,
        "window": WINDOW,
        "streaming": {"mixer": "streaming", "sinks": 3, "window": 20},
        "full": FULL,
    }
    run = saved_run(stack(blocks))
    model, _ = exported(run, tmp_path / "out", trust_remote_code=True)
    recipe = load_recipe(str(run / "recipe.yaml"), [])

    for length in (64, 113, 190):
        with torch.no_grad():
            cache = model(torch.zeros(1, length, dtype=torch.long)).past_key_values
        for layer, state in enumerate(cache.states):
            kept = sum(tensor.numel() for name, tensor in state.items() if name[0] in "kv")
            # The prediction counts the next token, whose key the cache does not have yet.
            next_token = 2 * recipe.model.kv_heads * 16
            predicted = state_bytes(recipe.model, length + 1, layer, element=1) - next_token
            assert kept == predicted, f"layer {layer} after {length} tokens"


def test_bf16_export_is_as_exact(saved_run, tmp_path):
    run = saved_run(*NATIVE["qwen3_5_text"])
    _, result = exported(run, tmp_path / "out", dtype="bfloat16")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert result.whole < 2e-5


def test_tokenizer_and_card_are_exported(saved_run, tmp_path):
    from longspan.trainer.data.tokenizer import ByteTokenizer
    from transformers import AutoTokenizer

    exported(saved_run(*NATIVE["llama"]), tmp_path / "out")
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = ByteTokenizer()
    for text in ("def f(x):\n\treturn x  # naïve — 漢字 🙂\r\n", " a  b", "\x00\x7f"):
        assert hf_tokenizer(text).input_ids == tokenizer.encode(text.encode())
        assert hf_tokenizer.decode(hf_tokenizer(text).input_ids) == text
    assert hf_tokenizer.eos_token_id == tokenizer.end_of_document
    assert hf_tokenizer.padding_side == "left"

    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained for 3 steps (100 tokens) on " in card
    assert "mixer: full" in card


def test_wrong_weights_are_not_written(saved_run, tmp_path, monkeypatch):
    """The check notices that two rows of one layer's matrices have changed places."""
    from longspan.trainer.huggingface import naming

    run = saved_run(*NATIVE["llama"])
    softmax_maps = naming.softmax

    def swapped(model, layer, *gates):
        for tensor_map in softmax_maps(model, layer, *gates):
            for rows in tensor_map.hf_rows.values():
                if rows is not None and layer == 1:
                    rows[[0, 1]] = rows[[1, 0]]
            yield tensor_map

    monkeypatch.setattr(naming, "softmax", swapped)
    with pytest.raises(UserError, match=r"logits of .* differ|greedy text differs"):
        exported(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_bad_input_leaves_nothing_behind(saved_run, tmp_path):
    run = saved_run(*NATIVE["llama"])
    out = tmp_path / "out"
    names_before = sorted(path.name for path in tmp_path.iterdir())

    def require_refusal(source, folder, message):
        with pytest.raises(UserError, match=re.escape(message)):
            exported(source, folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == names_before

    require_refusal(f"{run}@5", out, "has no checkpoint of step 5 (available: 3)")
    require_refusal(f"{run}@x", out, f"{run}@x: not the folder of a run")
    require_refusal(run, run, "already exists; remove it or choose another folder")

    damaged_file = next((run / "checkpoints" / "step-00000003").glob("*.distcp"))
    damaged_file.write_bytes(damaged_file.read_bytes()[:-100])
    require_refusal(run, out, "; the run has no other checkpoint")
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000002")
    require_refusal(run, out, f"; choose another checkpoint with {run}@STEP (available: 2)")

    shutil.rmtree(run / "checkpoints")
    require_refusal(run, out, "has no checkpoint yet")


def test_full_disk_leaves_nothing_behind(saved_run, tmp_path):
    run = saved_run(*NATIVE["llama"])
    paths_before = sorted(tmp_path.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = f"{tmp_path / 'out'}: cannot be written: .*File too large"

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError, match=message):
            exported(run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(tmp_path.iterdir()) == paths_before


def test_check_refuses_a_folder_of_another_run(saved_run, tmp_path):
    """A folder that is incomplete, too: one message, whatever torch and transformers raise."""
    from longspan.trainer.huggingface.check import check_export
    from longspan.trainer.huggingface.saved_run import SavedRun
    from safetensors.torch import load_file, save_file

    full = stack({"full": FULL})
    run = saved_run(full)
    out = tmp_path / "out"
    exported(run, out)

    def refusal(other=run):
        with process_group(2), pytest.raises(UserError) as caught:
            check_export(out, SavedRun(str(other)), lambda line: None)
        return str(caught.value)

    def refusal_of_run(name, *overrides):
        return refusal(saved_run(f"run_dir={tmp_path / name}", *overrides))

    fix = "name a folder that this run was exported to"
    assert refusal_of_run("words", full, "model.vocab_size=300") == (
        f"{out}: has a vocabulary of 257 tokens, "
        f"but {tmp_path}/words at step 3 has one of 300; {fix}"
    )
    assert refusal_of_run("window", stack({"w": WINDOW})) == (
        f"{out}: has the architecture llama, "
        f"but {tmp_path}/window at step 3 is exported as mistral; {fix}"
    )
    message = refusal_of_run("moba", stack({"m": {"mixer": "moba"}}))
    assert "chooses its keys from the content" in message
    sizes = ["model.hidden_size=128", "model.num_hidden_layers=2"]
    message = refusal_of_run("larger", full, *sizes)
    assert "logits of whole prompts differ" in message or "greedy text differs" in message

    file = out / "model.safetensors"
    tensors = load_file(file)
    matrix = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file({**tensors, "model.layers.2.mlp.up_proj.bias": matrix}, file, {"format": "pt"})
    names = "model.layers.2.mlp.up_proj.bias, model.layers.2.mlp.up_proj.weight"
    assert f"do not agree on {names}" in refusal()

    cut_norm = tensors["model.norm.weight"][:63].clone()
    save_file({**tensors, "model.norm.weight": cut_norm}, file, {"format": "pt"})
    shapes = "shape [63] in its files, [64] by its config.json"
    assert refusal() == f"{out}: model.norm.weight: {shapes}"

    file.write_bytes(file.read_bytes()[:-100])
    assert refusal().startswith(f"{out}: transformers cannot load it: ")


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
def test_check_prompts_are_longer_than_windows(name, length):
    from longspan.trainer.huggingface.check import prompt_length
    from longspan.trainer.huggingface.model_to_export import ModelToExport

    recipe = load_recipe(name, [])
    seq_length = recipe.training.seq_length
    assert prompt_length(ModelToExport(recipe.model, recipe.model.vocab_size, seq_length)) == length


def test_step_is_the_number_after_the_last_at_sign(saved_run, tmp_path):
    from longspan.trainer.huggingface.saved_run import SavedRun

    run = saved_run(*NATIVE["llama"]).rename(tmp_path / "lr@1e-3")
    assert SavedRun(str(run)).folder.path == run
    assert SavedRun(f"{run}@3").folder.path == run
    message = re.escape(f"{run}: has no checkpoint of step 4 (available: 3)")
    with pytest.raises(UserError, match=message):
        SavedRun(f"{run}@4")

    run = run.rename(tmp_path / "lr@3")
    assert SavedRun(f"{run}/").folder.path == run


def test_moba_cannot_be_exported(saved_run, tmp_path, longspan, tiny_recipe):
    moba = stack({"moba": {"mixer": "moba", "block": 8, "top_k": 2}})
    message = (
        "model.layers.blocks.moba: moba chooses its keys from the content, "
        "which no exported code does; use another mixer if the model is to be exported"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        exported(saved_run(moba), tmp_path / "out")
    dry_run = longspan("train", tiny_recipe, moba, "--dry-run")
    assert f"longspan export  cannot export this model: {message}" in dry_run.stdout


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (NATIVE["minimax"], "writes a transformers model of architecture minimax"),
        (
            ["model.rms_norm_eps=1e-5"],
            "writes a model with custom code (trust_remote_code=True): "
            "no architecture of transformers combines these layers",
        ),
        (
            NATIVE["minimax"][:-1],
            "minimax cannot express rms_norm_eps: 1e-05 (its lightning layers have 1e-6)",
        ),
    ],
    ids=["native", "mixed", "nearly native"],
)
def test_dry_run_names_the_architecture(tiny_recipe, overrides, line):
    from longspan.trainer.huggingface.model_to_export import ModelToExport
    from longspan.trainer.huggingface.registry import describe_target

    recipe = load_recipe(str(tiny_recipe), overrides)
    assert line in describe_target(ModelToExport(recipe.model, 257, 96))


@pytest.mark.parametrize(
    ("model", "parallel"),
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
def test_commands_export_and_check_a_run_of_two_ranks(
    longspan, ranks, tiny_recipe, tmp_path, model, parallel
):
    overrides = {**NATIVE, **MORE_NATIVE}[model]
    options = ["launch.processes=2", "training.steps=4", *parallel, *overrides]
    ranks(2, "longspan", "train", tiny_recipe, *options)

    run = tmp_path / "run"
    out = tmp_path / "model"
    export = longspan("export", run, out)
    assert export.returncode == 0, export.stderr
    architecture = model.partition(",")[0]
    assert f"writes a transformers model of architecture {architecture}" in export.stdout

    check = longspan("check-export", out, f"{run}@4")
    assert check.returncode == 0, check.stderr
    assert "72 tokens of greedy text are the same" in check.stdout

    refused = longspan("check-export", tmp_path, run)
    assert refused.returncode == 2
    message = "has no config.json; name the folder that longspan export wrote"
    assert refused.stderr == f"longspan: {tmp_path}: {message}\n"
