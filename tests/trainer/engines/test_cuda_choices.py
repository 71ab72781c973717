"""What is chosen on CUDA, computed on a CPU: with real numbers, whole training steps."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ..stacks import EXPERTS

pytestmark = pytest.mark.wide
WORKER = Path(__file__).parent / "cuda_choices_worker.py"


def steps_of(choice, count, recipe, *overrides):
    """Return what rank 0 of ``count`` processes printed. All of them must end well."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1" if choice == "triton" else "0",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, WORKER, recipe, choice, *overrides, f"launch.processes={count}"]
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize(
    ("count", "arrangement"),
    [
        (1, []),
        (2, ["parallel.ep=2"]),
        (2, ["parallel.cp=2", "parallel.ep=2"]),
    ],
    ids=["alone", "ep", "cp-ep"],
)
def test_experts_by_all_to_all(tiny_recipe, count, arrangement):
    given = [tiny_recipe, *EXPERTS, *arrangement]
    expected = steps_of("cpu", count, *given)
    found = steps_of("alltoall", count, *given)
    for step, expected_step in zip(found["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(expected_step, rel=1e-6)
    assert ("all_to_all_single" in found["chosen"]) == (count > 1)


TINY = [
    "model.num_hidden_layers=3",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.intermediate_size=32",
    "model.layers.pattern=[linear, sparse, full]",
    "model.layers.blocks.linear.num_heads=2",
    "model.layers.blocks.sparse={mixer: s2, block: 64, local_blocks: 1, stride: 2}",
    "data.packing=concat",
    "training.seq_length=256",
    "training.global_batch_size=1",
]
"""The layers of quickstart, with blocks that our kernels compute."""


@pytest.mark.parametrize(
    ("count", "arrangement"), [(1, []), (2, ["parallel.cp=2"])], ids=["alone", "cp"]
)
def test_steps_by_our_kernels(tiny_recipe, count, arrangement):
    given = [tiny_recipe, *TINY, *arrangement]
    expected = steps_of("cpu", count, *given)
    found = steps_of("triton", count, *given)
    assert found["documents"] > 1
    assert set(found["chosen"]) == {"linear triton", "softmax S2 triton", "softmax Causal triton"}
    for step, expected_step in zip(found["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(expected_step, rel=2e-6)
