"""``longspan slurm``: requests that are refused, the script it writes, and a job on a real Slurm.

That job gets the signal to stop, is requeued, and resumes.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

ON_CPUS = ["--nodes", "1", "--gpus-per-node", "0"]
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=30
JobRequeue=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--nodes", "0", "--time", "10"], ["--nodes: must be at least 1, got 0"]),
        (
            ["--nodes", "1", "--time", "a day"],
            ["--time: a day is not a time for Slurm, such as 90 (minutes), 12:00:00 or 2-00:00:00"],
        ),
        (
            ["--nodes", "1", "--time", "5"],
            [
                "--time: 5 leaves no time to train: "
                "the job is told to save and stop 300 s before its end"
            ],
        ),
        (
            ["--nodes", "1", "--gpus-per-node", "2", "--processes-per-node", "4", "--time", "60"],
            [
                "--processes-per-node: 4, but --gpus-per-node is 2, "
                "and each process needs a GPU of its own; use at most 2"
            ],
        ),
        (
            [
                "--nodes=1",
                "--gpus-per-node=-1",
                "--processes-per-node=0",
                "--cpus-per-task=0",
                "--notice=0",
                "--time=60",
            ],
            [
                "--gpus-per-node: must be at least 0, got -1",
                "--processes-per-node: must be at least 1, got 0",
                "--cpus-per-task: must be at least 1, got 0",
                "--notice: must be at least 1, got 0",
            ],
        ),
        (
            [
                "--nodes=1",
                "--restarts=-1",
                "--requeues=-2",
                "--notice=70000",
                "--time=2-00",
                "--account=",
                "--job-name=a b",
            ],
            [
                "--restarts: must be at least 0, got -1",
                "--requeues: must be at least 0, got -2",
                "--notice: must be at most 65535 s for Slurm, got 70000",
                "--account: must be one word, got ''",
                "--job-name: must be one word, got 'a b'",
            ],
        ),
        (
            ["parallel.cp=3", "--nodes", "2", "--gpus-per-node", "4", "--time", "1-00"],
            [
                "tiny.yaml: launch.processes: 8 is not a multiple of",
                "--nodes: 2 with 4 processes each are 8",
            ],
        ),
        (
            ["training.stpes=3", "--nodes", "1", "--time", "60"],
            ["tiny.yaml: training.stpes: unknown key (did you mean steps?)"],
        ),
    ],
)
def test_requests_that_cannot_run_are_refused(longspan, tiny_recipe, tmp_path, arguments, lines):
    completed = longspan("slurm", tiny_recipe, *arguments)
    assert completed.returncode == 2
    assert not (tmp_path / "run").exists()
    for line in lines:
        assert f"longspan: {line}" in completed.stderr


def test_the_script_contains_the_options(longspan, tiny_recipe, tmp_path):
    setup = ["--setup", "module load cuda", "--setup", "source .venv/bin/activate"]
    sizes = ["--nodes", "2", "--gpus-per-node", "4", "--time", "2-00:00:00"]
    options = [*sizes, "--account", "lab", "--partition", "gpu", *setup]
    completed = longspan(
        "slurm", tiny_recipe, "parallel.cp=2", "training.global_batch_size=8", *options
    )
    assert completed.returncode == 0, completed.stderr
    script = tmp_path / "run" / "slurm" / "train.sbatch"
    assert f"submit it with sbatch {script}" in completed.stdout
    text = script.read_text()
    expected = [
        "nodes=2",
        "time=2-00:00:00",
        "account=lab",
        "partition=gpu",
        "gpus-per-node=4",
        "signal=B:USR1@300",
        "requeue",
    ]
    for option in [*expected, f"chdir={Path.cwd()}"]:
        assert f"#SBATCH --{option}\n" in text
    assert "\nmodule load cuda\nsource .venv/bin/activate\n" in text
    assert f"-m longspan train {tiny_recipe} parallel.cp=2 training.global_batch_size=8 &" in text
    assert "{{" not in text
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_every_process_on_a_cpu_gets_a_core(longspan, tiny_recipe, tmp_path):
    script = tmp_path / "run" / "slurm" / "train.sbatch"
    for given, cores in (([], 2), (["--cpus-per-task", "12"], 12)):
        options = [*ON_CPUS, "--processes-per-node", "2", "--time", "60", *given]
        assert longspan("slurm", tiny_recipe, *options).returncode == 0
        assert f"#SBATCH --cpus-per-task={cores}\n" in script.read_text()


def test_submitting_without_slurm_is_refused(longspan, tiny_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    completed = longspan("slurm", tiny_recipe, *ON_CPUS, "--time", "60", "--submit")
    assert completed.returncode == 2
    remedy = "run it on a login node, or write the script here and take it"
    assert f"--submit: there is no sbatch here; {remedy}" in completed.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "run_dir={}/file/run",
            "run_dir: {}/file/run/slurm cannot be written: Not a directory; choose another",
        ),
        ("--out={}/folder", "--out: {}/folder cannot be written: Is a directory; choose another"),
    ],
)
def test_an_unwritable_path_is_reported(longspan, tiny_recipe, tmp_path, argument, line):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    completed = longspan("slurm", tiny_recipe, argument.format(tmp_path), *ON_CPUS, "--time", "60")
    assert (completed.returncode, completed.stderr) == (2, f"longspan: {line.format(tmp_path)}\n")
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("train.sbatch")]


@pytest.mark.parametrize("saves", [False, True])
def test_only_a_job_that_saved_is_requeued(longspan, tiny_recipe, tmp_path, saves):
    """Slurm's commands are replaced by scripts.

    The setup may read unset variables, and a STOP file from before the job does not stop it.
    """
    run = tmp_path / "run"
    commands_folder = tmp_path / "tools"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "STOP").touch()
    options = [*ON_CPUS, "--time", "60", "--setup", 'echo "$OF_A_MODULE" >setup']
    assert longspan("slurm", tiny_recipe, *options).returncode == 0
    work = (
        'echo "$@" >srun; test ! -e run/STOP || exit 9; touch started; '
        "until test -e run/STOP; do sleep 0.05; done"
    )
    commands = {
        "srun": f"{work}; mkdir run/checkpoints/step-00000006" if saves else work,
        "scontrol": 'test "$1" = show || echo "$@" >queue',
    }
    commands_folder.mkdir()
    for name, text in commands.items():
        (commands_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands_folder / name).chmod(0o755)
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_ON_NODE": "6",
        "PATH": f"{commands_folder}:{os.environ['PATH']}",
    }
    command = ["bash", run / "slurm" / "train.sbatch"]
    job = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True
    )
    _wait_until(lambda: job.poll() is not None or (tmp_path / "started").exists(), 20, "the start")
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=20)
    assert "--cpus-per-task 6 torchrun " in (tmp_path / "srun").read_text()
    queue = tmp_path / "queue"
    if saves:
        assert (job.returncode, queue.read_text(), errors) == (0, "requeue 7\n", "")
    else:
        assert (job.returncode, queue.exists()) == (1, False)
        assert (
            errors
            == "longspan: no checkpoint since this job began, not requeued: give it more --time\n"
        )


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Start a Slurm of one node, with its commands on the PATH, and yield its folder.

    It is the Slurm that ``slurm_here.sh`` unpacked, or else that of the machine.
    """
    unpacked = Path(os.environ.get("LONGSPAN_SLURM", "/nowhere"), "root")
    if unpacked.is_dir():
        library = next(unpacked.glob("usr/lib/*-linux-gnu"))
        own_library = unpacked / library.relative_to(unpacked / "usr")
        monkeypatch.setenv("LD_LIBRARY_PATH", f"{library}:{library}/slurm-wlm:{own_library}")
        monkeypatch.setenv("PATH", f"{unpacked}/usr/bin:{unpacked}/usr/sbin:{os.environ['PATH']}")
    slurmctld = _daemon("slurmctld")
    slurmd = _daemon("slurmd")
    if slurmctld is None or slurmd is None:
        pytest.skip("needs Slurm, as tests/launch/slurm_here.sh unpacks it")

    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        folder.joinpath(name).mkdir(parents=True)
    plugins = [
        path
        for root in (unpacked, Path("/"))
        for path in root.glob("usr/lib/*-linux-gnu/slurm-wlm")
    ]
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(
            host=socket.gethostname().split(".")[0],
            user=os.environ.get("USER", "root"),
            ports=[_free_port(), _free_port()],
            folder=folder,
            plugins=plugins[0] if plugins else None,
            cpus=os.cpu_count(),
        )
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))

    real = Path(os.path.realpath(slurmctld))
    stepd = [*real.parent.glob("slurmstepd*"), *real.parent.parent.glob("sbin/slurmstepd*")][0]
    commands = {
        "slurmctld": [slurmctld, "-D", "-f", conf],
        "slurmd": [slurmd, "-D", "-f", conf, "-d", stepd],
    }
    logs = {name: folder / f"{name}.log" for name in commands}
    daemons = []
    for name, command in commands.items():
        log = logs[name].open("w")
        daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        _wait_until_idle(logs.values())
        yield folder
    finally:
        user = os.environ.get("USER", "root")
        subprocess.run(["scancel", "--signal=KILL", "--full", f"--user={user}"], check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)


def _daemon(name: str) -> str | None:
    """Return the path of one of Slurm's daemons, by its own name or Debian's, or None."""
    return shutil.which(name) or shutil.which(f"{name}-wlm")


def _wait_until_idle(logs: Iterable[Path]) -> None:
    """Wait until Slurm's node is ready."""
    for _ in range(120):
        states = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False
        )
        if "idle" in states.stdout:
            return
        time.sleep(0.5)
    pytest.fail("".join(log.read_text() for log in logs))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def _state(job: str) -> str:
    shown = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=True
    ).stdout
    return re.search(r"JobState=(\w+)", shown)[1]


def _wait_until(condition, seconds: float, event: str, log: Path = Path(os.devnull)) -> None:
    for _ in range(int(seconds * 5)):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail(f"{event} did not happen within {seconds:g} s\n{log.read_text()}")


def test_a_request_that_slurm_refuses_writes_nothing(slurm, longspan, tiny_recipe, tmp_path):
    options = [*ON_CPUS, "--time", "30", "--partition", "nowhere"]
    completed = longspan("slurm", tiny_recipe, *options, "--submit")
    line = "longspan: --submit: Slurm refuses the job: invalid partition specified: nowhere"
    assert (completed.returncode, completed.stderr.count("\n")) == (2, 1)
    assert completed.stderr.startswith(line)
    assert not (tmp_path / "run").exists()


def test_a_job_runs_in_the_folder_of_the_longspan_command(
    slurm, longspan, tiny_recipe, tmp_path, monkeypatch
):
    """Wherever sbatch is run; also in a folder whose name Slurm could read as two words."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    completed = longspan("slurm", tiny_recipe, "run_dir=a run", *ON_CPUS, "--time", "30")
    assert completed.returncode == 0, completed.stderr
    script = folder / "a run" / "slurm" / "train.sbatch"
    submitted = subprocess.run(
        ["sbatch", "--hold", script], cwd="/", capture_output=True, text=True, check=False
    )
    assert submitted.returncode == 0, submitted.stderr
    job = re.search(r"\d+", submitted.stdout)[0]
    shown = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=True
    ).stdout
    assert f"WorkDir={folder}\n" in shown
    assert f"StdOut={folder}/a run/slurm/{job}.out\n" in shown
    assert "JobName=a run\n" in shown


def test_a_job_signalled_to_stop_is_requeued_and_resumes(slurm, longspan, tiny_recipe, tmp_path):
    """The losses equal those of an undisturbed run bit by bit, with two processes in one task."""
    options = [
        "training.steps=120",
        "metrics.log_interval=1",
        "parallel.cp=2",
        "checkpoint.interval=0",
    ]
    alone = longspan(
        "train", tiny_recipe, *options, "launch.processes=2", f"run_dir={tmp_path / 'alone'}"
    )
    assert alone.returncode == 0, alone.stderr
    path = f"export PATH={Path(sys.executable).parent}:$PATH"
    package = f"export PYTHONPATH={os.environ.get('PYTHONPATH', '')}"
    slurm_options = [*ON_CPUS, "--processes-per-node", "2", "--time", "30", "--notice", "60"]
    completed = longspan(
        "slurm",
        tiny_recipe,
        *options,
        *slurm_options,
        "--setup",
        path,
        "--setup",
        package,
        "--submit",
    )
    assert completed.returncode == 0, completed.stderr
    job = re.fullmatch(r"Submitted batch job (\d+)\n", completed.stdout)[1]
    run = tmp_path / "run"
    log = run / "slurm" / f"{job}.out"
    _wait_until(lambda: (run / "metrics.jsonl").exists() and len(_losses(run)) > 5, 120, "training")
    # As Slurm does before the time is up.
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    _wait_until(lambda: _state(job) in ("PENDING", "REQUEUED"), 60, "a requeue", log)
    stopped = max(_losses(run))
    assert stopped < 120
    # Slurm holds a requeued job for two minutes; this cuts the wait short. A node refuses a job
    # within a second after its end.
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+5"], check=False)
    _wait_until(lambda: _state(job) == "COMPLETED", 300, "the end", log)
    assert f"resuming from step {stopped}" in log.read_text()
    assert _losses(run) == _losses(tmp_path / "alone")
    assert list(run.glob(f"slurm/{job}/**/stderr.log"))  # one of each rank
