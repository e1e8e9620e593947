"""Which titan this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

UNINSTALLED = "not installed"


def titan_version() -> str:
    """Return the version of the installed distribution; a checkout that was only put on the path has none."""
    try:
        return version("titan-pretrain")
    except PackageNotFoundError:
        return UNINSTALLED
