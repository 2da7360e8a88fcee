# SPDX-License-Identifier: Apache-2.0
"""Which serving programs are installed here, and how each comes to our attention."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import NamedTuple

from vsa.installation import DISTRIBUTION
from vsa.integrations.hosts import aside

PLUGIN = "vsa"


class Host(NamedTuple):
    """A program that serves video models.

    Attributes:
        distribution: its name in the package index.
        read: the version whose source we have read, and whose layers were run.
        how: what a user does to have our attention in it.
        group: its group of entry points, where it finds us by itself.
        allows: its own setting that names the plugins which may load.
        elsewhere: what becomes of it on a GPU that our kernels do not take, where it finds us by
            itself.
        exact: whether that setting is read as it stands, so that an empty one names nothing and
            spaces count; else an empty one allows all.
    """

    distribution: str
    read: str
    how: str
    group: str | None = None
    allows: str | None = None
    elsewhere: str | None = None
    exact: bool = False


HOSTS = (
    Host(
        "fastvideo",
        "0.2.1",
        "vsa.integrations.fastvideo.install() before it makes a model, or "
        "python -m vsa.integrations.fastvideo.run MODULE",
    ),
    Host(
        "sglang",
        "0.5.23",
        "--attention-backend video_sparse_attn",
        "sglang.multimodal_gen.plugins",
        "SGLANG_PLUGINS",
        "keeps its own kernel for video_sparse_attn_h3, and runs video_sparse_attn, whose kernel "
        "went with the import name vsa, on FlexAttention or PyTorch",
    ),
    Host(
        "vllm-omni",
        "0.30.0",
        "--diffusion-attention-backend FASTVIDEO_VSA",
        "vllm_omni.general_plugins",
        "VLLM_PLUGINS",
        "keeps its own class for FASTVIDEO_VSA if fastvideo_kernel is installed, and else runs it "
        "on FlexAttention or PyTorch",
        exact=True,
    ),
    Host("xfuser", "0.7.0", "vsa.integrations.xdit.install(backend, topk)"),
    Host("diffusers", "0.42.1", "vsa.integrations.diffusers.apply_vsa(transformer, topk)"),
)


def hosts_found() -> list[tuple[str, str]]:
    """Distribution and version of every host that is installed, and how it takes us."""
    found = []
    for host in HOSTS:
        try:
            here = version(host.distribution)
        except PackageNotFoundError:
            continue
        found.append((f"{host.distribution} {here}", _state(host, here)))
    return found


def _state(host: Host, here: str) -> str:
    other = "" if here == host.read else f"; tried was {host.read}, not this one"
    if host.group is None:
        return f"takes it by {host.how}{other}"
    if why := _not_loaded(host, host.group):
        return f"does not take it: {why}"
    if why := aside.unsupported():
        return f"{host.elsewhere}: backend 'hopper' cannot run here, {why}{other}"
    return f"takes it by itself, with {host.how}{other}"


def _not_loaded(host: Host, group: str) -> str | None:
    """Why the host does not load our plugin, None where it does."""
    names = [each.name for each in entry_points(group=group)]
    if PLUGIN not in names:
        return f"{DISTRIBUTION} is installed without its entry points: install it again"
    allowed = os.environ.get(host.allows or "")
    if allowed is None or (not allowed and not host.exact):
        return None
    loaded = [name if host.exact else name.strip() for name in allowed.split(",")]
    return None if PLUGIN in loaded else f"{host.allows}={allowed!r} leaves out the plugin {PLUGIN}"
