"""Versions of what is installed, and which of them longspan works with."""

import platform
import runpy
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from .errors import UserError

SUPPORTED = {
    "python": ">=3.11,<3.14",
    "torch": ">=2.11",
    "triton": ">=3.6",
    "megatron-core": ">=0.16.1,<=0.19.2",
    "deepspeed": "==0.19.8",
    "transformers": ">=5.20",
}
"""The versions of packages that longspan works with, as ``pyproject.toml`` has them.

Only pip enforces what stands there, and an image may bring packages of its own.
"""

TRAINING = ("python", "torch", "triton", "megatron-core")
"""What every training process needs."""


def version_of(package: str) -> str | None:
    """Return the version of a package, or of ``"python"`` itself; None if it is not installed."""
    if package == "python":
        return platform.python_version()
    if package == "megatron-core":
        return _megatron_version() or _installed_version(package)
    return _installed_version(package)


def unsupported(*packages: str) -> list[str]:
    """Return a line for each package whose version longspan does not work with.

    Packages that are not installed are passed over: importing them says so. So are those of which
    any version will do.
    """
    lines = [_problem(package) for package in packages if package in SUPPORTED]
    return [line for line in lines if line]


def require_supported(*packages: str) -> None:
    """Raise UserError if longspan does not work with the installed version of a package.

    Nothing is imported, so this is known before any process is started.
    """
    if lines := unsupported(*packages):
        raise UserError("\n".join(lines))


def _problem(package: str) -> str | None:
    from packaging.specifiers import SpecifierSet

    found = version_of(package)
    if found is None:
        return None
    # NVIDIA's builds of torch have versions of pre-releases; no other pre-release was tried.
    prereleases = package == "torch"
    if not SpecifierSet(SUPPORTED[package]).contains(found, prereleases=prereleases):
        return _line(package, found, "longspan", SUPPORTED[package])
    if package == "triton":
        wanted = _triton_of_torch()
        if wanted and not SpecifierSet(wanted).contains(found):
            return _line(package, found, f"torch {version_of('torch')}", wanted)
    return None


def _line(package: str, found: str, by: str, wanted: str) -> str:
    fix = "use such a Python" if package == "python" else f"pip install '{package}{wanted}'"
    return f"{package}: {found} is installed, but {by} needs {wanted}; {fix}"


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _megatron_version() -> str | None:
    """Return the version of the Megatron-core that would be imported, which may come from a folder
    that pip knows nothing of; None if there is none.

    It is read without importing the package, which takes seconds.
    """
    try:
        package = find_spec("megatron.core")
    except ImportError:  # there is no megatron either
        return None
    if package is None or package.origin is None:
        return None
    info = Path(package.origin).with_name("package_info.py")
    return runpy.run_path(str(info)).get("__version__") if info.is_file() else None


def _triton_of_torch() -> str | None:
    """Return which versions of Triton the installed torch requires; None if it requires none, as
    the builds for CPUs do.
    """
    from packaging.requirements import Requirement

    try:
        lines = requires("torch") or []
    except PackageNotFoundError:
        return None
    for requirement in map(Requirement, lines):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "triton" and applies:
            return str(requirement.specifier) or None
    return None
