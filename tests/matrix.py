"""A core of the tests in fresh environments, with the oldest and the newest supported packages.

``make test-matrix`` runs it; CI does not. Only builds of torch for CPUs are installed: a set that
would download CUDA is left out, and the end says so, as it does for Pythons that are not here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "matrix"
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
TESTED_TORCH = re.findall(r"^torch==(.*)$", CONSTRAINTS, re.MULTILINE)[0]
CORE = [
    "tests/test_imports.py",
    "tests/trainer/test_versions.py",
    "tests/trainer/model",
    "tests/trainer/engines/test_close.py",
    "tests/trainer/engines/test_images.py",
    "tests/golden/test_numbers.py",
]
TEST_PACKAGES = ["pytest", "pytest-timeout", "expecttest", "hypothesis", "packaging"]


class PackageSet(NamedTuple):
    """What one environment has."""

    python: str
    torch: str
    """A version, or nothing for the newest."""
    megatron_core: str

    def __str__(self) -> str:
        torch = self.torch or "(newest)"
        return f"Python {self.python}, torch {torch}, megatron-core {self.megatron_core}"


SETS = [
    PackageSet("3.11", "2.11.0", "0.16.1"),
    PackageSet("3.11", TESTED_TORCH, "0.16.1"),
    # Its metadata asks for Python 3.12, but its sources run on 3.11.
    PackageSet("3.11", TESTED_TORCH, "0.19.2"),
    PackageSet("3.12", TESTED_TORCH, "0.19.2"),
    PackageSet("3.13", "", "0.19.2"),
]


class NotHereError(Exception):
    """A set cannot be tried on this machine; the message says why."""


def main() -> int:
    outcomes = {packages: try_set(packages) for packages in SETS}
    print("\n" + "\n".join(f"{packages}: {outcome}" for packages, outcome in outcomes.items()))
    return int("FAILED" in outcomes.values())


def try_set(packages: PackageSet) -> str:
    """Install a set and run the tests with it; return what came of it."""
    print(f"\n== {packages}", flush=True)
    try:
        python = environment(packages)
    except NotHereError as reason:
        return f"not tried: {reason}"
    tests = subprocess.run([python, "-m", "pytest", *CORE], cwd=ROOT, check=False)
    return "FAILED" if tests.returncode else "passed"


def environment(packages: PackageSet) -> str:
    """Make a fresh environment with a set, and return its Python.

    Raises:
        NotHereError: there is no such Python here, or no build of torch for CPUs.
    """
    found = uv("python", "find", "--no-python-downloads", packages.python, check=False)
    if found.returncode:
        raise NotHereError(f"there is no Python {packages.python} here")
    require_cpu_build(packages)

    folder = FOLDER / re.sub(r"\W+", "-", str(packages))
    python = str(folder / "bin" / "python")
    uv("venv", "--clear", "--seed", "--python", found.stdout.strip(), str(folder))
    constraints = FOLDER / "constraints.txt"
    constraints.write_text(without_pins(CONSTRAINTS, "torch", "triton", "megatron-core"))
    # The version of Megatron-core is set below, where its metadata is passed over.
    overrides = FOLDER / "overrides.txt"
    overrides.write_text("megatron-core==0.16.1\n")
    uv(
        *("pip", "install", "--python", python, *find_links()),
        *("--constraint", str(constraints), "--override", str(overrides)),
        *("--editable", str(ROOT), torch_requirement(packages), *TEST_PACKAGES),
    )
    megatron_core = f"megatron-core=={packages.megatron_core}"
    options = ["--no-deps", "--ignore-requires-python", "-q"]
    subprocess.run([python, "-m", "pip", "install", *options, megatron_core], check=True)
    return python


def require_cpu_build(packages: PackageSet) -> None:
    """Raise NotHereError if installing this torch would download CUDA."""
    wanted = FOLDER / "torch.in"
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted.write_text(torch_requirement(packages) + "\n")
    resolved = uv(
        *("pip", "compile", "--quiet", "--no-header", "--no-annotate", *find_links()),
        *("--python-version", packages.python, str(wanted)),
        check=False,
    )
    if resolved.returncode:
        raise NotHereError(f"it cannot be resolved: {resolved.stderr.strip().splitlines()[-1]}")
    cuda = re.search(r"^(nvidia|cuda)-\S+", resolved.stdout, re.MULTILINE)
    if cuda:
        raise NotHereError(f"its torch would download CUDA ({cuda[0]}, ...)")


def torch_requirement(packages: PackageSet) -> str:
    return f"torch=={packages.torch}" if packages.torch else "torch"


def find_links() -> list[str]:
    """Return uv's option for the folders of wheels that pip is told of, if it is."""
    folders = os.environ.get("PIP_FIND_LINKS", "").split()
    return [option for folder in folders for option in ("--find-links", folder)]


def without_pins(constraints: str, *packages: str) -> str:
    """Return constraints without those of these packages."""
    pins = tuple(f"{package}==" for package in packages)
    return "\n".join(line for line in constraints.splitlines() if not line.startswith(pins)) + "\n"


def uv(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "uv", *arguments, "--no-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done


if __name__ == "__main__":
    sys.exit(main())
