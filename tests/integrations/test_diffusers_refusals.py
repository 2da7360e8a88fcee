# SPDX-License-Identifier: Apache-2.0
"""What the integration of diffusers refuses, and what it says where diffusers is missing."""

from __future__ import annotations

import pytest
from torch import nn

pytest.importorskip("diffusers")
import diffusers
from integrations.tiny_transformers import run, wan

from vsa.integrations.diffusers import apply_vsa
from vsa.integrations.diffusers.families import FAMILIES
from vsa.integrations.diffusers.not_taken import NOT_TAKEN


def test_what_is_not_supported_is_refused_in_one_sentence() -> None:
    with pytest.raises(TypeError, match=r"one of WanTransformer3DModel, .* but it is a Linear$"):
        apply_vsa(nn.Linear(1, 1))
    pipe = type("Pipeline", (), {"transformer": None})()
    with pytest.raises(TypeError, match=r"a Pipeline: pass its \.transformer"):
        apply_vsa(pipe)
    model, inputs = wan()
    for arguments, kind, sentence in (
        ({"topk": 0}, ValueError, "topk"),
        ({"topk": (1, 2, 3)}, ValueError, "topk as a tuple"),
        ({"tile": (9, 9, 9)}, ValueError, "tile"),
        ({"dense_layers": [2]}, ValueError, "dense_layers must be numbers from -2 to 1"),
        ({"dense_steps": -1}, ValueError, "dense_steps"),
        ({"refresh_every": 0}, ValueError, "refresh_every"),
        ({"gates": "both"}, ValueError, "gates must be None or"),
        ({"tail": "mean"}, TypeError, "tail must be True or False, but it is 'mean'"),
    ):
        with pytest.raises(kind, match=sentence):
            apply_vsa(model, **arguments)
    assert not hasattr(model, "_vsa_plan")

    apply_vsa(model, topk=2)
    model.blocks[1].attn1.processor = type("Custom", (), {})()
    with pytest.raises(RuntimeError, match=r"blocks\.1 has been replaced by a Custom"):
        run(model, inputs)
    with pytest.raises(TypeError, match=r"must be diffusers' WanAttnProcessor, but it is a Custom"):
        apply_vsa(model, topk=2)

    model, inputs = wan()
    apply_vsa(model, topk=2, refresh_every=2).enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="refresh_every must be 1 where gradient checkpointing"):
        run(model, inputs)


def test_every_video_transformer_of_diffusers_is_taken_or_refused_with_a_reason() -> None:
    there = {name for name in dir(diffusers) if name.endswith("Transformer3DModel")}
    taken = {family.transformer for family in FAMILIES}
    # TransformerTemporalModel and the like are parts of others; all 3D ones are named.
    assert taken | set(NOT_TAKEN) == there and not taken & set(NOT_TAKEN)
    for name in NOT_TAKEN:
        other = type(name, (nn.Module,), {})()
        with pytest.raises(TypeError, match=rf"but it is a {name}, (which|whose) .*[a-z]$"):
            apply_vsa(other)


def test_integrations_import_without_diffusers_and_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib
    import sys

    for name in [name for name in sys.modules if name.startswith("vsa.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    importlib.import_module("vsa.integrations")
    with pytest.raises(ImportError, match=r"pip install '\.\[diffusers\]' in a clone"):
        importlib.import_module("vsa.integrations.diffusers")
