"""Versions of what is installed."""

import platform
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """Return the version of a package, or of ``"python"`` itself; None if it is not installed."""
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None
