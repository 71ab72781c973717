"""``longspan doctor``: what is installed on a machine, and what is missing."""

import re
from importlib.metadata import PackageNotFoundError, version

from longspan.launch import gpu_support
from longspan.launch.commands import doctor
from longspan.trainer import versions


def test_versions_disk_and_speeds_are_reported(longspan, tmp_path):
    completed = longspan("doctor", "--folder", tmp_path / "runs")
    assert completed.returncode == 0, completed.stderr
    for name in doctor.REQUIRED:
        assert re.search(rf"^{name} +{re.escape(version(name))}$", completed.stdout, re.M)
    assert re.search(
        rf"^disk +{tmp_path}: [0-9,.]+ GiB free, [0-9,]+ MB/s written to the disk$",
        completed.stdout,
        re.M,
    )
    assert "GPU     none: training runs on the CPU, over gloo" in completed.stdout
    assert re.search(
        r"^between 2 ranks over gloo: [0-9.]+ GB/s out of each", completed.stdout, re.M
    )
    assert not (tmp_path / "runs").exists()
    assert re.search(
        r"^Triton kernel +compiled in [0-9.]+ s, not run, as there is no GPU$",
        completed.stdout,
        re.M,
    )
    assert re.search(r"^torch's flash-attn +not in this build of torch$", completed.stdout, re.M)


def test_missing_packages_are_reported_with_the_consequence(capsys, monkeypatch, tmp_path):
    def without(name):
        if name in ("deepspeed", "wandb"):
            raise PackageNotFoundError
        return version(name)

    monkeypatch.setattr(versions, "version", without)
    assert doctor.doctor(str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert re.search(r"^deepspeed +MISSING$", out, re.M)
    assert re.search(r"^wandb +not installed: metrics.wandb is refused$", out, re.M)
    assert "cannot train without deepspeed: pip install deepspeed" in out


def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})
    )
    assert doctor._disk(tmp_path / "a" / "b") == f"{tmp_path}: 1 MiB free, TOO LITTLE"


def test_what_triton_needs_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/opt/cc")
    assert gpu_support.c_compiler() == "/opt/cc"
    monkeypatch.delenv("CC")
    monkeypatch.setattr(gpu_support.shutil, "which", {"clang": "/usr/bin/clang"}.get)
    assert gpu_support.c_compiler() == "/usr/bin/clang"
    monkeypatch.setattr(gpu_support.shutil, "which", lambda name: None)
    assert gpu_support.c_compiler().startswith("MISSING")

    monkeypatch.setattr(gpu_support.sysconfig, "get_path", lambda name: str(tmp_path))
    assert re.fullmatch(r"MISSING, .* install python3\.\d+-dev", gpu_support.python_header())
    (tmp_path / "Python.h").touch()
    assert gpu_support.python_header() == str(tmp_path / "Python.h")


def test_a_kernel_that_cannot_be_compiled_is_reported(monkeypatch):
    monkeypatch.setattr(gpu_support.sys, "executable", "/bin/false")
    assert gpu_support._compiled_kernel() == ("FAILED: exit status 1", False)


def test_gpus_of_a_kind_share_the_rows_of_their_backends():
    rows = gpu_support.backend_rows([90, 90, 75])
    assert len(rows) == len(set(rows))
    assert ("sm_90 triton", "full, s2, window, streaming, pattern") in [
        (kind, mixers[: len("full, s2, window, streaming, pattern")]) for kind, mixers in rows
    ]
    on_turing = [mixers for kind, mixers in rows if kind == "sm_75 torch, SLOW"]
    assert any(mixers.startswith("s2") for mixers in on_turing)
