"""``longspan rehearse``: what it records, and shipped recipes on GPUs that are not here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from longspan.trainer.predict.estimate import DEVICES as DEVICES_BY_NAME
from longspan.trainer.recipe.file import load_recipe

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
HERE = Path(__file__).parent
BUDGETS = yaml.safe_load((HERE / "budgets.yaml").read_text())
"""For each recipe, cut to some layers: its overrides, and what a step may launch and wait for."""
DEVICES = ["a100", "a10", "l40s", "h100", "b200", "5090"]


def test_what_is_recorded():
    worker = subprocess.run(
        [sys.executable, str(HERE / "recorder_worker.py")], capture_output=True, text=True
    )
    assert worker.returncode == 0, worker.stderr[-3000:]


def rehearsed(longspan, tmp_path, recipe, *arguments):
    file = tmp_path / "found.json"
    completed = longspan("rehearse", recipe, *arguments, "--json", file)
    assert file.exists(), completed.stderr
    found = json.loads(file.read_text())
    assert completed.returncode == (1 if found["faults"] else 0)
    return found, completed.stdout


CASES = [
    pytest.param(
        recipe,
        device,
        marks=[] if (recipe, device) == ("phi-3-small", "h100") else [pytest.mark.wide],
        id=f"{recipe}-{device}",
    )
    for recipe in BUDGETS
    for device in DEVICES
]


@pytest.mark.parametrize(("recipe", "device"), CASES)
def test_a_recipe_in_rehearsal(longspan, tmp_path, recipe, device):
    budget = BUDGETS[recipe]
    found, printed = rehearsed(
        longspan, tmp_path, recipe, *budget["overrides"], "--device", device, "--documents", "2"
    )
    assert found["faults"] == []
    assert found["slow_backends"] == [] or budget.get("slow_backends"), found["slow_backends"]
    assert found["waits_per_layer"] <= budget["waits"], found["waits"]["step"]
    assert found["kernels_per_layer"] <= budget["kernels"], found["top_kernels"]
    assert printed.startswith("rehearsed rank 0 of ")
    assert "would fail: none" in printed
    for planned in planned_backends(recipe, budget["overrides"], device):
        assert any(
            f": {planned.backend}, " in line and planned.reasons in line
            for line in found["backends"]
        )


def planned_backends(recipe, overrides, device):
    from longspan.trainer.predict.backends import block_backends

    return block_backends(load_recipe(recipe, overrides), DEVICES_BY_NAME[device].capability)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("recipe", "arguments", "documents"),
    [
        ("llama-1.3b", [], 1000),
        ("s2-llama-1.3b", [], 128),  # as many as there are blocks
        ("s2-llama-1.3b", ["parallel.cp=4", "--gpus", "8", "--rank", "1"], 128),
    ],
)
def test_many_documents_launch_no_more_than_one(longspan, tmp_path, recipe, arguments, documents):
    kernels = []
    for number in (1, documents):
        found, _ = rehearsed(
            longspan, tmp_path, recipe, "model.num_hidden_layers=4", *arguments,
            "--documents", str(number),
        )  # fmt: skip
        assert found["faults"] == []
        kernels.append(found["kernels_per_layer"])
    assert kernels[1] <= kernels[0]


def test_requests_that_make_no_sense_are_refused(longspan):
    for arguments, message in [
        (["--device", "h1000"], "--device: unknown (did you mean h100?)"),
        (["--rank", "8", "--gpus", "8"], "--rank: must be 0 to 7, got 8"),
        (["--documents", "0"], "--documents: must be 1 to "),
        (["--gpus", "0"], "--gpus: must be at least 1, got 0"),
    ]:
        completed = longspan("rehearse", "quickstart", *arguments)
        assert completed.returncode == 2
        assert message in completed.stderr
