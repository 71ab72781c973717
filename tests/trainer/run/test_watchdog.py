"""A hanging rank: the others report which it is, and the run ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def _ranks(parent: int) -> dict[int, int]:
    """Return the processes of the ranks that ``parent`` has started, by rank."""
    pid_by_rank = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{parent}\n" in (entry / "status").read_text():
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (entry / "environ").read_bytes())
                pid_by_rank[int(rank[1])] = int(entry.name)
        except (OSError, TypeError):
            continue
    return pid_by_rank


def test_reports_are_grouped_by_what_ranks_are_doing():
    from longspan.trainer.run.watchdog import _describe, _RankReport

    reports = [
        _RankReport("step 7", 61.2, 12),
        _RankReport("the data of step 7", 61.0, 12),
        _RankReport("step 7", 61.3, 12),
        _RankReport("step 6", 3.0, 2),
    ]
    assert _describe(reports, [10, 10, 10, 2]) == [
        "ranks 0, 2: in step 7 for 61 s",
        "rank 1: in the data of step 7 for 61 s",
        "rank 3: not answering, last in step 6",
    ]


@pytest.mark.wide
def test_a_hanging_rank_is_reported_and_ends_the_run(tiny_recipe, tmp_path):
    options = [
        "launch.processes=2",
        "parallel.cp=2",
        "launch.hang_timeout_s=8",
        "training.steps=100000",
        "metrics.log_interval=1",
    ]
    command = [sys.executable, "-m", "longspan", "train", str(tiny_recipe), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        for _ in range(900):
            if metrics.exists() and len(metrics.read_text().splitlines()) > 5:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"it does not train: {log.read_text()}")
        os.kill(_ranks(run.pid)[1], signal.SIGSTOP)
        run.wait(90)
    finally:
        run.kill()
    errors = log.read_text()
    assert run.returncode == 1
    step = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    assert re.search(
        rf"^longspan: rank 0: (?:the \w+ of )?step (?:{step}|{step + 1}) takes \d+ s, "
        "more than launch",
        errors,
        re.M,
    )
    assert re.search(
        r"^longspan: rank 1: not answering, last in (?:the \w+ of )?step \d+$", errors, re.M
    )
    assert "Current thread" in errors  # the stacks
    assert "trainer/run/loop.py" in errors
