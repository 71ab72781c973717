"""Under torchrun: two agents, as on two machines, and ranks that die and are restarted."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path

import pytest

pytestmark = pytest.mark.wide
OPTIONS = ["training.steps=60", "metrics.log_interval=1", "parallel.cp=2", "checkpoint.interval=4"]


@pytest.fixture
def torchrun(tiny_recipe):
    """``torchrun(*options)``: start an agent that trains the tiny recipe, or runs a script."""
    started = []

    def start(
        *options: str, script: tuple = ("-m", "longspan", "train", tiny_recipe, *OPTIONS)
    ) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, script)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for agent in started:
        agent.kill()


@pytest.fixture
def undisturbed_losses(longspan, tiny_recipe, tmp_path) -> dict[int, float]:
    """Return the losses of an undisturbed run on two processes."""
    completed = longspan(
        "train", tiny_recipe, *OPTIONS, "launch.processes=2", f"run_dir={tmp_path / 'alone'}"
    )
    assert completed.returncode == 0, completed.stderr
    return losses(tmp_path / "alone")


def losses(run: Path) -> dict[int, float]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def two_machines() -> list[str]:
    """Return the options of each of two agents with one process each."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    return ["--nnodes", "2", "--nproc-per-node", "1", *rendezvous, "--rdzv-id", "test"]


def test_two_agents_form_one_run(torchrun, undisturbed_losses, tmp_path):
    options = two_machines()
    agents = [torchrun(*options) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=200)
        assert agent.returncode == 0, errors
    assert losses(tmp_path / "run") == undisturbed_losses


def test_ranks_rejoin_after_a_death_that_one_agent_alone_notices(torchrun, tmp_path):
    """As with NCCL, the other agent's ranks do not fail; it restarts them without counting that."""
    script = tmp_path / "script.py"
    options = [*two_machines(), "--max-restarts", "1"]
    script.write_text(WAITING_SCRIPT)
    agents = [torchrun(*options, script=(script, tmp_path / "died")) for _ in range(2)]
    for agent in agents:
        out, errors = agent.communicate(timeout=100)
        assert agent.returncode == 0, errors
        assert "together again" in out


WAITING_SCRIPT = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from longspan.launch.process import process_group

died = pathlib.Path(sys.argv[1])
before = died.exists()
with process_group(1):
    dist.barrier()
    if not before and dist.get_rank() == 1:
        died.touch()
        os._exit(1)
    if not before:
        time.sleep(1000)
    dist.barrier()
    print("together again")
"""


def test_a_killed_rank_is_restarted_within_the_job(torchrun, undisturbed_losses, tmp_path):
    """It happens twice, and each time training continues from the last checkpoint bit by bit."""
    agent = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    killed_processes: set[int] = set()
    for rank, step in ((1, 6), (0, 20)):
        killed_processes.add(_kill(agent, rank, tmp_path / "run", step, killed_processes))
        time.sleep(1)
    _, errors = agent.communicate(timeout=200)
    assert agent.returncode == 0, errors
    assert losses(tmp_path / "run") == undisturbed_losses


def test_a_request_to_stop_survives_a_restart(torchrun, tmp_path):
    """The request comes while the ranks are being restarted."""
    agent = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    _kill(agent, 1, tmp_path / "run", 6)
    (tmp_path / "run" / "STOP").touch()
    out, errors = agent.communicate(timeout=200)
    assert agent.returncode == 0, errors
    (step,) = re.findall(
        rf"stopped after step (\d+) of 60, as asked by {tmp_path}/run/STOP, now removed", out
    )
    assert int(step) == max(losses(tmp_path / "run")) < 60
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:0>8}").is_dir()
    assert not (tmp_path / "run" / "STOP").exists()


def test_a_stale_request_stops_one_start_only(torchrun, tmp_path):
    file = tmp_path / "run" / "STOP"
    file.parent.mkdir()
    for stale, step, line in (
        (
            True,
            1,
            f"stopped after step 1 of 60, as asked by {file}, now removed; "
            "the same command resumes from there",
        ),
        (False, 60, "resuming from step 1"),
        (True, 60, "all 60 steps are done"),
    ):
        if stale:
            file.touch()
        agent = torchrun("--standalone", "--nproc-per-node", "2")
        out, errors = agent.communicate(timeout=200)
        assert agent.returncode == 0, errors
        assert line in out
        assert max(losses(tmp_path / "run")) == step
        assert not file.exists()


def _kill(
    agent: subprocess.Popen, rank: int, run: Path, step: int, excluded: Container[int] = ()
) -> int:
    """Kill a rank of this agent once the run has reached a step, and return its process.

    The processes ``excluded`` are not killed.
    """
    for _ in range(600):
        if (
            max(losses(run), default=0) >= step
            and (process := _process(agent.pid, rank))
            and process not in excluded
        ):
            os.kill(process, signal.SIGKILL)
            return process
        time.sleep(0.1)
    pytest.fail(f"step {step} was not reached")


def _process(parent: int, rank: int) -> int | None:
    """Return the process of a rank that this agent started, if it is there."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "status").read_text()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and b"RANK=%d" % rank in environment:
            return int(entry.name)
    return None
