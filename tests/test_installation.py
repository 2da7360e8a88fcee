# SPDX-License-Identifier: Apache-2.0
"""The import name: shared with an unrelated project, so a clash says what to do."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from vsa import installation


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(installation, "version", version)


def test_a_foreign_package_of_the_same_import_name_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _installed(monkeypatch, **{"vsa": "0.0.4", installation.DISTRIBUTION: "0.1.0"})
    with pytest.raises(ImportError, match=r"vsa 0\.0\.4.*pip uninstall -y vsa"):
        installation.installed_version()


def test_the_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, **{installation.DISTRIBUTION: "1.2.3"})
    assert installation.installed_version() == "1.2.3"
    _installed(monkeypatch)
    with pytest.raises(ImportError, match=r"pip install \."):
        installation.installed_version()
