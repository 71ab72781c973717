"""Stopping a run of several processes from outside, as a user or a scheduler does."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest


def _accept_ctrl_c():
    """Restore Ctrl-C, which background jobs of a shell and their children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tiny_recipe, tmp_path):
    """Start a long run of two processes and wait for its first steps."""
    processes = []

    def run(*overrides):
        train = [sys.executable, "-m", "longspan", "train", tiny_recipe]
        command = [*train, "launch.processes=2", "training.steps=100000"]
        log = (tmp_path / "log").open("w")
        processes.append(
            subprocess.Popen(
                [*command, *overrides], stdout=log, stderr=log, preexec_fn=_accept_ctrl_c
            )
        )
        deadline = time.monotonic() + 120
        while "step" not in (tmp_path / "log").read_text():
            assert processes[-1].poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return processes[-1]

    yield run
    for process in processes:
        process.kill()


@pytest.mark.parametrize(
    "signal_number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.wide)]
)
def test_one_signal_stops_all_ranks_and_saves(start, longspan, tmp_path, signal_number):
    process = start("parallel.cp=2")
    process.send_signal(signal_number)
    assert process.wait(60) == 75
    (step,) = re.findall(
        "stopped after step ([0-9]+) of 100000, as asked", (tmp_path / "log").read_text()
    )
    assert re.search(
        rf"^{step} .* whole$", longspan("status", tmp_path / "run").stdout, re.MULTILINE
    )
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_folder_has_one_run_at_a_time_and_its_stop_file_stops_it(
    start, longspan, tiny_recipe, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()  # from an earlier run
    process = start()
    assert "running: process " in longspan("status", tmp_path / "run").stdout
    second = longspan("train", tiny_recipe, "training.steps=100000")
    assert second.returncode == 2
    assert f"run_dir: {tmp_path / 'run'} is in use by process " in second.stderr
    (tmp_path / "run" / "STOP").touch()
    assert process.wait(60) == 75
    assert not (tmp_path / "run" / "STOP").exists()
    assert "not running" in longspan("status", tmp_path / "run").stdout


@pytest.mark.wide
def test_a_second_signal_ends_the_run_at_once(start, tmp_path):
    # A step takes a minute.
    process = start("training.seq_length=24576", "training.global_batch_size=64")
    child_pids = children_of(process.pid)
    assert len(child_pids) == 2
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # so soon after the first it is the same request
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT
    assert "ended at once by a second SIGINT" in (tmp_path / "log").read_text()
    assert not any(os.path.exists(f"/proc/{child}") for child in child_pids)


@pytest.mark.wide
def test_a_signal_to_all_processes_is_one_request(start, tmp_path):
    """Service managers and SLURM signal all processes."""
    process = start("parallel.cp=2")
    for pid in (process.pid, *children_of(process.pid)):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert "stopped after step" in (tmp_path / "log").read_text()


@pytest.mark.wide
def test_ranks_save_and_stop_when_the_process_that_started_them_is_killed(
    start, longspan, tmp_path
):
    process = start("parallel.cp=2")
    child_pids = children_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{child}") for child in child_pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (step,) = re.findall(
        "stopped after step ([0-9]+) of 100000, as asked", (tmp_path / "log").read_text()
    )
    assert re.search(
        rf"^{step} .* whole$", longspan("status", tmp_path / "run").stdout, re.MULTILINE
    )


def test_a_second_signal_ends_a_rank_that_hangs(tmp_path):
    hanging_script = """
import ctypes, os, sys
from longspan.trainer.run.stop import StopRequest
with StopRequest(sys.argv[1]):
    mutex = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    print("hanging", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # in C, where no handler of Python's runs
"""
    process = subprocess.Popen(
        [sys.executable, "-c", hanging_script, tmp_path / "STOP"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM


def test_a_signal_ignored_at_start_stays_ignored(tmp_path):
    ignoring_script = """
import os, signal, sys
from longspan.trainer.run.stop import StopRequest
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's & has it
with StopRequest(__import__("pathlib").Path(sys.argv[1])) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    __import__("time").sleep(0.2)
    sys.exit(stop.is_requested())
"""
    completed = subprocess.run(
        [sys.executable, "-c", ignoring_script, tmp_path / "STOP"], check=False
    )
    assert completed.returncode == 0


def test_a_failing_rank_ends_the_first_rank_too(monkeypatch, capfd):
    from longspan.launch import ranks

    monkeypatch.setattr(ranks, "_GRACE_SECONDS", 0.5)
    script = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    start_time = time.monotonic()
    assert ranks.run_ranks([sys.executable, "-c", script], 2, 1) == 7
    assert time.monotonic() - start_time < 30
    assert "rank 1 ended with status 7" in capfd.readouterr().err


def test_a_killed_rank_ends_the_others(start, tmp_path):
    process = start("parallel.cp=2")
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    assert process.wait(30) == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in (tmp_path / "log").read_text()


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [int(child) for child in listed.stdout.split()]
