"""Versions of what is installed."""

import platform
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """Of ``"python"`` too; None for a package that is not there."""
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None
