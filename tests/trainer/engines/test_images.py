"""Images that bring Transformer Engine and Apex: training starts, and gives the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from longspan.launch.commands import doctor

EXPERTS = Path(__file__).parents[2] / "golden" / "experts.yaml"
MODULES = {
    "transformer_engine": (
        "transformer_engine",
        "transformer_engine/pytorch",
        "transformer_engine/pytorch/optimizers",
        "transformer_engine_torch",
    ),
    "apex": (
        "apex",
        "apex/optimizers",
        "apex/multi_tensor_apply",
        "amp_C",
        "fused_weight_gradient_mlp_cuda",
    ),
}
RAISES_IF_USED = """
__version__ = "2.20.0"

def _use(self, *args, **others):
    raise RuntimeError(f"{type(self).__name__} was used")

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": _use})
"""
RAISES_IF_IMPORTED = "raise OSError('undefined symbol: _ZN3c104cuda9SetDeviceEi')\n"
"""As a build for another torch does."""


def image(folder: Path, packages: list[str], text: str = RAISES_IF_USED) -> str:
    """Return a folder with stand-ins of these packages, for PYTHONPATH."""
    for package in packages:
        for module in MODULES[package]:
            path = folder / module
            path.mkdir(parents=True)
            path.joinpath("__init__.py").write_text(text)
    return os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


@pytest.fixture
def losses(longspan, tmp_path, corpus):
    """Train a model with experts, and return its losses and norms in hexadecimal."""

    def train(name: str, *overrides: str, **environment: str) -> list[tuple[str, str]]:
        done = longspan(
            "train",
            EXPERTS,
            f"run_dir={tmp_path / name}",
            f'data.sources={{"{corpus}": 1.0}}',
            "training.steps=2",
            "checkpoint.interval=2",
            "launch.processes=1",
            *overrides,
            **environment,
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps = [record for record in records if "train/loss" in record]
        return [(step["train/loss"].hex(), step["train/grad_norm"].hex()) for step in steps]

    return train


def test_training_is_the_same_in_every_image(losses, tmp_path):
    plain = losses("plain")
    assert len(plain) == 2
    both = image(tmp_path / "both", [*MODULES])
    assert losses("with both", PYTHONPATH=both) == plain


@pytest.mark.wide
def test_one_package_a_broken_build_and_the_other_engine(losses, tmp_path):
    apex = image(tmp_path / "apex", ["apex"])
    assert losses("with apex", PYTHONPATH=apex) == losses("plain")
    broken = image(tmp_path / "broken", [*MODULES], RAISES_IF_IMPORTED)
    assert losses("with broken", PYTHONPATH=broken) == losses("plain again")
    whole = image(tmp_path / "whole", [*MODULES])
    zero = "engine.name=deepspeed"
    assert losses("zero with both", zero, PYTHONPATH=whole) == losses("zero", zero)


def test_doctor_names_what_is_not_used(monkeypatch, tmp_path, capsys):
    image(tmp_path, ["apex"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "run_ranks", lambda *options: 0)
    monkeypatch.setattr(doctor, "_disk", lambda folder: "not measured")
    assert doctor.doctor(str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["apex", "installed, which longspan does not use"] in [
        line.split(maxsplit=1) for line in lines
    ]
    assert not any("transformer-engine" in line for line in lines)


def test_fp32_stays_fp32_on_gpus():
    """NVIDIA's images set this variable; torch reads it when it is imported."""
    program = """
import os, torch
from longspan.launch.process import _prepare_gpu
before = torch.get_float32_matmul_precision()
_prepare_gpu()
print(before, torch.get_float32_matmul_precision(), os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])
"""
    for given, kept in (({}, "1"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8")):
        environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", **given}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout.split() == ["high", "highest", kept], done.stderr


def test_megatron_core_imported_with_their_optimizer_is_refused(monkeypatch, tiny_recipe):
    """As by a script that imports Megatron-core before longspan."""
    from longspan.launch.process import process_group
    from longspan.trainer import megatron_core
    from longspan.trainer.engines.build import build_engine
    from longspan.trainer.errors import UserError
    from longspan.trainer.recipe.file import load_recipe

    assert megatron_core.optimizer.Adam is torch.optim.AdamW
    monkeypatch.setattr(megatron_core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    with process_group(1), pytest.raises(UserError, match="was imported before longspan"):
        build_engine(load_recipe(str(tiny_recipe)))
