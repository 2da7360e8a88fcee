# SPDX-License-Identifier: Apache-2.0
"""xDiT's own USP with its own registry, one rank, one key of which is ours."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from hosts import loose, reference, wheels
from hosts.wan_layers import Found, error, tensors

from vsa.integrations import xdit

REAL = {"xfuser.core.distributed.attention_backend", "xfuser.model_executor.layers.usp"}
GRID = (5, 7, 9)
UNITS = 1e-12


def run(folder: Path) -> Iterator[Found]:
    """Video self-attention, which is sparse, and a call without a grid, which is not."""
    root = wheels.fetch("xfuser", "0.7.0", folder)
    with loose.Only(root, {"xfuser"}, REAL):
        _make_ready()
        registry = importlib.import_module("xfuser.core.distributed.attention_backend")
        usp = importlib.import_module("xfuser.model_executor.layers.usp").USP
        key = registry.AttentionBackendType.SDPA_MATH
        theirs = xdit.install(key, 3)
        q, k, v = (x.transpose(1, 2) for x in tensors(GRID[0] * GRID[1] * GRID[2], 3))
        tiles = reference.video_tiles(GRID, (4, 4, 4))
        for name, kwargs, topk in (("grid", {"thw": GRID}, 3), ("no grid", None, 99)):
            out = usp(q, k, v, backend=key, attention_kwargs=kwargs).transpose(1, 2)
            right = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), tiles, topk, None)
            yield Found(f"USP, {name}", error(out, right), UNITS)
        registry.register_attention_function(key)(theirs)


def _make_ready() -> None:
    def one() -> int:
        return 1

    loose.give(
        "xfuser.core.distributed",
        get_ulysses_parallel_world_size=one,
        get_ring_parallel_world_size=one,
        get_sequence_parallel_world_size=one,
        get_runtime_state=lambda: SimpleNamespace(
            attention_backend=None,
            fp8_comms=None,
            runtime_config=SimpleNamespace(use_spargeattn_head_balance=False),
        ),
    )
    loose.give(
        "xfuser.core.sparge_attention.head_balance",
        COST_SINK_KEY="cost",
        apply_head_balance=lambda q, k, v, *_, attention_kwargs=None, **__: (
            q,
            k,
            v,
            False,
            attention_kwargs,
        ),
    )
    loose.give("xfuser.core.distributed.fp8_comms", fp8_attention_kwargs=lambda *_: {})
    absent = SimpleNamespace(get_packages_info=lambda: defaultdict(bool))
    loose.give("xfuser.envs", PACKAGES_CHECKER=absent)
