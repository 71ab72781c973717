"""Versions that longspan works with; others are refused by name, before anything is started."""

import re
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from longspan.launch.commands import doctor
from longspan.trainer import versions
from longspan.trainer.errors import UserError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_what_is_supported_is_what_pip_is_told():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    dependencies = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, project["dependencies"])
    }
    dependencies["python"] = SpecifierSet(project["requires-python"])
    for package, supported in versions.SUPPORTED.items():
        assert dependencies[package] == SpecifierSet(supported), package


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a version of a package is installed: ``installed(package, version)``."""

    def pretend(package: str, number: str) -> None:
        real = versions.version_of
        monkeypatch.setattr(
            versions, "version_of", lambda name: number if name == package else real(name)
        )

    return pretend


@pytest.mark.parametrize(
    ("package", "numbers"),
    [
        ("megatron-core", ["0.16.1", "0.17.1", "0.18.2", "0.19.0", "0.19.2", "0.19.2+1a2b3c"]),
        ("torch", ["2.11.0", "2.13.0+cpu", "2.15.0", "2.12.0a0+nv26.10"]),
        ("python", ["3.11.0", "3.12.9", "3.13.1"]),
    ],
)
def test_supported_versions(installed, package, numbers):
    for number in numbers:
        installed(package, number)
        assert versions.unsupported(package) == []


@pytest.mark.parametrize(
    ("package", "number", "line"),
    [
        *(
            (
                "megatron-core",
                number,
                f"megatron-core: {number} is installed, but longspan needs >=0.16.1,<=0.19.2; "
                "pip install 'megatron-core>=0.16.1,<=0.19.2'",
            )
            for number in ("0.15.3", "0.16.0", "0.17.0rc0", "0.19.3", "0.20.0", "1.0")
        ),
        (
            "torch",
            "2.10.1+cu128",
            "torch: 2.10.1+cu128 is installed, but longspan needs >=2.11; "
            "pip install 'torch>=2.11'",
        ),
        (
            "triton",
            "3.5.1",
            "triton: 3.5.1 is installed, but longspan needs >=3.6; pip install 'triton>=3.6'",
        ),
        (
            "python",
            "3.14.0",
            "python: 3.14.0 is installed, but longspan needs >=3.11,<3.14; use such a Python",
        ),
    ],
)
def test_other_versions_are_refused_by_name(installed, package, number, line):
    installed(package, number)
    with pytest.raises(UserError) as refused:
        versions.require_supported("numpy", package)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("asked", "problems"),
    [
        (["filelock", 'triton==3.9.0; sys_platform == "linux"'], 1),
        ([f'triton=={version("triton")}; sys_platform == "linux"'], 0),
        (['triton==3.9.0; sys_platform == "win32"'], 0),
        (['triton==3.9.0; extra == "more"'], 0),
        ([], 0),
    ],
)
def test_triton_is_the_one_that_torch_asks_for(monkeypatch, asked, problems):
    monkeypatch.setattr(versions, "requires", lambda package: asked)
    lines = versions.unsupported("triton")
    assert len(lines) == problems
    if lines:
        assert re.fullmatch(
            r"triton: [\d.]+ is installed, but torch [\d.+a-z]+ needs ==3.9.0; "
            r"pip install 'triton==3.9.0'",
            lines[0],
        )


@pytest.fixture
def newer_megatron(tmp_path):
    """A folder with a Megatron-core of another version that pip knows nothing of."""
    folder = tmp_path / "megatron-lm"
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    core.joinpath("__init__.py").write_text("raise RuntimeError('imported')\n")
    core.joinpath("package_info.py").write_text('__version__ = "0.20.0"\n')
    return folder


def test_a_folder_on_the_path_is_what_counts(longspan, newer_megatron, tiny_recipe):
    """A clone of Megatron-LM on PYTHONPATH, as images have it: seen without importing it."""
    path = str(newer_megatron)
    line = (
        "megatron-core: 0.20.0 is installed, but longspan needs >=0.16.1,<=0.19.2; "
        "pip install 'megatron-core>=0.16.1,<=0.19.2'"
    )
    for command in (
        ["train", tiny_recipe],
        ["train", tiny_recipe, "--dry-run"],
        ["verify", tiny_recipe],
    ):
        done = longspan(*command, PYTHONPATH=path)
        assert (done.returncode, done.stderr) == (2, f"longspan: {line}\n"), done.stdout
    done = longspan("doctor", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stdout.endswith(f"cannot train with what is installed:\n{line}\n")


def test_without_megatron_core_there_is_no_version(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    monkeypatch.setattr(versions, "version", _not_installed)
    assert versions.version_of("megatron-core") is None
    assert versions.unsupported("megatron-core") == []
    assert doctor.doctor(str(tmp_path)) == 1


def _not_installed(name):
    raise versions.PackageNotFoundError(name)


def test_doctor_and_training_agree(monkeypatch, installed, tmp_path, capsys):
    installed("megatron-core", "0.20.0")
    monkeypatch.setattr(shutil, "disk_usage", None)  # it is not reached
    assert doctor.doctor(str(tmp_path)) == 1
    assert "megatron-core: 0.20.0 is installed" in capsys.readouterr().out
