"""``longspan doctor``: what is installed on a machine, and what is missing."""

import re
from importlib.metadata import PackageNotFoundError, version

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
