"""The shipped recipes: each is valid, and has a tiny twin that trains, resumes and is exported."""

import pytest
from longspan.trainer.data.tokenizer import recipe_vocab_size
from longspan.trainer.huggingface.model_to_export import ModelToExport
from longspan.trainer.huggingface.registry import choose_target
from longspan.trainer.predict.estimate import DEVICES, GIB, estimate
from longspan.trainer.recipe.file import SHIPPED, load_recipe, shipped_recipes
from transformers import AutoModelForCausalLM

TARGETS = {
    "llama-1.3b": "llama",
    "s2-llama-1.3b": "longspan",
    "s2-llama-7b": "longspan",
    "phi-3-small": "longspan",
    "minimax-01": "minimax",
    "transnormer-1b": "longspan",
    "qwen3.5-9b": "qwen3_5_text",
    "olmo-hybrid-7b": "olmo_hybrid",
    "kimi-linear": "longspan",
    "based-1.3b": "longspan",
    "samba-1.3b": "longspan",
    "masformer-1.3b": "ministral",
    "gemma-3-1b": "longspan",
    "llama-1.3b-1m": "longspan",
}


def exported_model_type(name: str) -> str:
    to_export = ModelToExport.of_recipe(load_recipe(name))
    return choose_target(to_export)[0].model_type


def test_every_recipe_has_a_tiny_twin_and_an_expected_target():
    names = {str(path.relative_to(SHIPPED).with_suffix("")) for path in shipped_recipes()}
    others = {name for name in names if name == "quickstart" or name.startswith("mqar/")}
    assert names - others == set(TARGETS) | {f"{name}-tiny" for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipe_and_its_twin_are_exported_as_the_same_architecture(name):
    assert exported_model_type(name) == exported_model_type(f"{name}-tiny") == TARGETS[name]
    recipe = load_recipe(name)
    twin = load_recipe(f"{name}-tiny")
    mixers = [{block.kind() for block in variant.model.stack} for variant in (recipe, twin)]
    assert mixers[0] == mixers[1]
    lines = SHIPPED.joinpath(f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")  # its origin


@pytest.mark.wide
@pytest.mark.parametrize("name", TARGETS)
def test_the_header_states_the_predictions_of_plan(name):
    recipe = load_recipe(name)
    predicted = estimate(recipe, recipe_vocab_size(recipe), DEVICES["h100"])
    memory = sum(predicted.memory) / GIB
    speed = predicted.tokens_per_second / 1e6
    assert memory < DEVICES["h100"].memory_gib
    numbers = (
        f"{memory:.1f} GiB, {predicted.step_s:.2f} s a step, {speed:.2f} M tokens/s (predicted)."
    )
    header = f"# longspan plan, {recipe.launch.processes} x H100: {numbers}"
    assert header in SHIPPED.joinpath(f"{name}.yaml").read_text().splitlines()


@pytest.mark.wide
@pytest.mark.parametrize("name", TARGETS)
def test_a_twin_trains_resumes_and_is_exported(longspan, corpus, tmp_path, name):
    def run(*arguments):
        completed = longspan(*arguments)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    # The small corpus is shorter than the recipe's own held-out text.
    twin = [f"{name}-tiny", f"run_dir={tmp_path / 'run'}", f"data.validation={corpus}"]
    steps = 16 if "1m" in name else 3  # into its second stage
    run("train", *twin, f"training.steps={steps}")
    assert f"resuming from step {steps}" in run("train", *twin, f"training.steps={steps + 2}")
    out = run("export", tmp_path / "run", tmp_path / "model")
    assert "tokens of greedy text are the same" in out
    has_code = TARGETS[name] == "longspan"
    assert bool(list((tmp_path / "model").glob("*.py"))) == has_code
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=has_code)
    assert model.config.model_type == TARGETS[name]
