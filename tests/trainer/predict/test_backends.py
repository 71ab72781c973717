"""Which backend blocks get on a GPU: said of the calls that mixers make, as the calls decide it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from longspan.attention.backend_choice import choices
from longspan.attention.gpu import assumed_gpu, compute_capability
from longspan.attention.linear import attention as linear
from longspan.attention.softmax import attend as softmax
from longspan.launch import training
from longspan.launch.process import process_group
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.predict.backends import backend_lines, block_backends
from longspan.trainer.recipe.file import load_recipe
from longspan.trainer.run.display import Display
from longspan.trainer.run.report import Report

from ..stacks import LINEAR, LINEAR_MORE, MOBA, PATTERNS

CUDA = torch.device("cuda", 0)


def backends_of(recipe, capability, *overrides):
    found = block_backends(load_recipe(recipe, list(overrides)), capability)
    return {each.block: each for each in found}


@pytest.mark.parametrize(
    "stack",
    [
        LINEAR,
        pytest.param([MOBA], marks=pytest.mark.wide),
        pytest.param([PATTERNS], marks=pytest.mark.wide),
        pytest.param(LINEAR_MORE, marks=pytest.mark.wide),
    ],
    ids=["linear", "moba", "patterns", "more linear"],
)
def test_the_calls_asked_about_are_those_that_mixers_make(tiny_recipe, monkeypatch, stack):
    asked, made = set(), set()
    ask_softmax, ask_linear = softmax.fastest_backend, linear.fastest_backend

    def record(calls, ask):
        def choose(*arguments, **options):
            choice = ask(*arguments, **options)
            calls.add((choice.operation, choice.call))
            return choice

        return choose

    recipe = load_recipe(str(tiny_recipe), [*stack, "training.dtype=float32"])
    with monkeypatch.context() as patch:
        patch.setattr(softmax, "fastest_backend", record(asked, ask_softmax))
        patch.setattr(linear, "fastest_backend", record(asked, ask_linear))
        block_backends(recipe, 90)

    def choose_softmax(backend, *arguments):
        record(made, ask_softmax)(*arguments)
        return "torch"

    def choose_linear(backend, *arguments):
        record(made, ask_linear)(*arguments)
        return linear.BACKENDS["torch"]()

    monkeypatch.setattr(softmax, "choose_backend", choose_softmax)
    monkeypatch.setattr(linear, "_choose_backend", choose_linear)
    run_forward(recipe)
    assert asked == made


def run_forward(recipe):
    from longspan.trainer.engines.build import build_engine

    with process_group(2):
        engine = build_engine(recipe)
        with contextlib.closing(engine):
            engine.logits(torch.zeros(1, 48, dtype=torch.int64))


def test_faster_chips_and_smaller_heads_get_faster_backends():
    on_hopper = backends_of("gemma-3-1b", 90)
    assert on_hopper["full"].backend == "flash"
    assert on_hopper["full"].reasons.startswith("triton supports head dims up to 128, not 256")
    assert backends_of("llama-1.3b", 90)["full"][1:] == ("triton", False, "")

    on_turing = backends_of("llama-1.3b", 75)["full"]
    assert on_turing.is_slow
    assert "triton has no configurations for compute capability 7.5" in on_turing.reasons


def test_a_slow_backend_is_a_warning():
    recipe = load_recipe("quickstart")
    line, warning = backend_lines(recipe, 90)
    assert line == "backends: linear triton; full triton"
    assert warning.startswith("warning: sparse is computed by torch's formulas, several times ")
    assert "needs blocks of at least 64 tokens, but S2(32, 8, 4, head_step=1) has 32" in warning


def test_the_log_of_a_run_on_a_gpu_says_them(tiny_recipe, capsys):
    recipe = load_recipe(str(tiny_recipe))
    engine = SimpleNamespace(num_parameters=1, capability=90, dtype=torch.bfloat16)
    report = Report(recipe, RunFolder(recipe.run_dir), steps_done=0, is_first=True)
    report._display = Display(recipe.training.steps, log_interval=1)
    report.start(engine, [], None)
    assert set(backend_lines(recipe, 90)) < set(capsys.readouterr().out.splitlines())


def test_a_dry_run_on_a_machine_with_a_gpu_says_them(capsys, monkeypatch):
    monkeypatch.setattr(training, "_GPU_DRIVERS", ("/",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with assumed_gpu(80):
        training.train("quickstart", [], dry_run=True)
    assert "\nbackends: linear triton; full triton\nwarning: sparse is" in capsys.readouterr().out


def test_nothing_is_counted_as_a_choice():
    before = choices.copy()
    backends_of("s2-llama-1.3b", 90)
    assert choices == before


def test_numbers_of_other_makers_are_not_compute_capabilities(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    compute_capability_found = compute_capability(torch.device("cuda", 7))
    assert compute_capability_found == 0
    with assumed_gpu(90):
        assert compute_capability(CUDA) == 90
    on_amd = backends_of("llama-1.3b", 0)["full"]
    assert on_amd.is_slow
    assert on_amd.reasons.startswith("triton has no configurations for AMD's GPUs")
