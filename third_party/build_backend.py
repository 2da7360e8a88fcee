# SPDX-License-Identifier: Apache-2.0
"""setuptools' build backend, plus nvcc as wheels where the machine has no nvcc that works."""

from __future__ import annotations

from cuda_toolchain import wheels_to_build_with
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  a backend is the set of hooks it exports


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Build requirements beyond those in pyproject.toml."""
    return build_meta.get_requires_for_build_wheel(config_settings) + wheels_to_build_with()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """As for a wheel: an editable install compiles as well."""
    return build_meta.get_requires_for_build_editable(config_settings) + wheels_to_build_with()
