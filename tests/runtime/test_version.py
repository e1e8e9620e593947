"""Which titan this is, installed or not."""

import importlib.metadata

import pytest

from titan_core.runtime import version


def test_a_checkout_on_the_path_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", missing)
    assert version.titan_version() == "not installed"
    monkeypatch.setattr(version, "version", lambda name: f"{name} 1.2")
    assert version.titan_version() == "titan-pretrain 1.2"
