"""Under torchrun: two agents, as on two machines, and ranks that die and are started anew."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.wide
OPTIONS = ["training.steps=60", "metrics.log_interval=1", "parallel.cp=2", "checkpoint.interval=4"]


@pytest.fixture
def torchrun(tiny_recipe):
    """``torchrun(*options)`` starts an agent that trains the tiny recipe."""
    started = []

    def start(*options: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            "-m",
            "longspan",
            "train",
            str(tiny_recipe),
            *OPTIONS,
        ]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for agent in started:
        agent.kill()


@pytest.fixture
def alone(longspan, tiny_recipe, tmp_path) -> dict[int, float]:
    """The losses of a run on two processes to which nothing happens."""
    done = longspan("train", tiny_recipe, *OPTIONS, "launch.processes=2", f"run_dir={tmp_path / 'alone'}")
    assert done.returncode == 0, done.stderr
    return losses(tmp_path / "alone")


def losses(run: Path) -> dict[int, float]:
    lines = run.joinpath("metrics.jsonl").read_text().splitlines() if run.joinpath("metrics.jsonl").exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def test_two_agents_are_one_run(torchrun, alone, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    agents = [torchrun(*where, "--rdzv-id", "test") for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=200)
        assert agent.returncode == 0, errors
    assert losses(tmp_path / "run") == alone


def test_a_rank_that_dies_is_started_anew_within_the_job(torchrun, alone, tmp_path):
    """Twice; to the same bits, from the last checkpoint."""
    agent = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    killed: set[int] = set()
    for rank, step in ((1, 6), (0, 20)):
        for _ in range(600):
            if (
                max(losses(tmp_path / "run"), default=0) >= step
                and (found := _process(agent.pid, rank))
                and found not in killed
            ):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"step {step} was not reached")
        os.kill(found, signal.SIGKILL)
        killed.add(found)
        time.sleep(1)
    _, errors = agent.communicate(timeout=200)
    assert agent.returncode == 0, errors
    assert losses(tmp_path / "run") == alone


def _process(parent: int, rank: int) -> int | None:
    """Of the rank that this agent started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (entry / "status").read_text(), (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and b"RANK=%d" % rank in environment:
            return int(entry.name)
    return None
