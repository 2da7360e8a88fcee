# SPDX-License-Identifier: Apache-2.0
"""Transformers of every supported family, dense against sparse."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vsa

pytest.importorskip("diffusers")
from diffusers.models import attention_dispatch
from integrations.tiny_transformers import (
    BATCH,
    FAMILIES,
    GRID,
    HEAD_DIM,
    HEADS,
    UNLIKE,
    anyflow,
    cosmos,
    easyanimate,
    framepack,
    hunyuan,
    ltx,
    mochi,
    run,
    wan,
    wan_image_to_video,
)

from vsa.integrations.diffusers import apply_vsa, collect, processors, remove_vsa
from vsa.integrations.diffusers.processors import SparseProcessor

JOINT_OR_NOT = [wan, hunyuan]
WITHOUT_LIST = mochi, framepack, cosmos, easyanimate, anyflow  # of attn_processors


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_the_dense_model_and_removal_restores_its_bits(family: Any) -> None:
    model, inputs = family()
    dense = run(model, inputs)
    assert dense.abs().max() > 1e-2
    before = list(model.state_dict())
    apply_vsa(model, topk=1.0)
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-4)
    apply_vsa(model, topk=2, gates="coarse")
    sparse = run(model, inputs)
    assert sparse.isfinite().all() and (sparse - dense).abs().max() > 1e-4
    remove_vsa(model)
    assert torch.equal(run(model, inputs), dense)
    assert list(model.state_dict()) == before


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_only_video_self_attention_is_replaced_and_knows_the_grid(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = family()
    grids: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        grids.append(kwargs["grid"].shape)
        return vsa.attention(*args, **kwargs)

    monkeypatch.setattr(processors, "attention", spy)
    before = {name: type(each).__name__ for name, each in _processors(model).items()}
    apply_vsa(model, topk=0.5)
    after = {name: type(each).__name__ for name, each in _processors(model).items()}
    changed = {name for name in before if before[name] != after[name]}
    assert len(changed) == 2
    run(model, inputs)
    assert grids == [GRID] * 2
    assert all(_processors(model)[name].work is None for name in changed)  # no pass, no work
    assert not any("attn2" in name or "refiner" in name for name in changed)


def _processors(model: nn.Module) -> dict[str, Any]:
    return {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_LIST])
def test_diffusers_lists_and_sets_our_processors_as_its_own(family: Any) -> None:
    model, inputs = family()
    apply_vsa(model, topk=2)
    sparse = run(model, inputs)
    listed = model.attn_processors
    ours = [name for name, each in listed.items() if isinstance(each, SparseProcessor)]
    own = f".{model._vsa_plan.family.attention}.processor"  # blocks.0.attn1.processor
    paths = [name.removesuffix(own) for name in ours]
    assert sorted(paths) == sorted(model._vsa_plan.layers)
    model.set_attn_processor(dict(listed))
    assert torch.equal(run(model, inputs), sparse)


@torch.no_grad()
def test_steps_are_told_apart_by_timesteps_per_token() -> None:
    model, inputs = wan()
    T, H, W = GRID
    # Wan 2.2 TI2V: the tokens of the first frame are clean.
    noisy = (torch.arange(T * H * W) >= H * W).float().expand(BATCH, -1)

    def at(timestep: float) -> Tensor:
        return run(model, {**inputs, "timestep": timestep * noisy})

    exact = {timestep: at(timestep) for timestep in (900.0, 800.0)}
    apply_vsa(model, topk=1, dense_steps=1)
    assert torch.equal(at(900.0), exact[900.0]) and not torch.equal(at(800.0), exact[800.0])


def another_video(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, another video of the same size."""
    return {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_recomputes_with_the_grid_of_its_own_forward(family: Any) -> None:
    model, inputs = family()
    apply_vsa(model, topk=0.3, tile=(2, 3, 4))
    plain = run(model, inputs)
    plain.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model.enable_gradient_checkpointing()
    checkpoint = model._gradient_checkpointing_func
    out = run(model, inputs)
    assert torch.equal(out, plain)
    assert model._gradient_checkpointing_func.original is checkpoint
    if family in (wan, wan_image_to_video):
        # As many tokens on another grid: only what the first forward carried along tells them
        # apart.
        other = inputs["hidden_states"].transpose(3, 4).contiguous()
        with torch.no_grad():
            run(model, {**inputs, "hidden_states": other})
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
    assert remove_vsa(model)._gradient_checkpointing_func is checkpoint


@torch.no_grad()
@pytest.mark.older_pytorch
@pytest.mark.parametrize("family", UNLIKE)
def test_blocks_compile_as_one_graph(family: Any) -> None:
    model, inputs = family()
    apply_vsa(model, topk=0.3, gates="coarse")
    eager = run(model, inputs)
    torch._dynamo.reset()
    # compile_repeated_blocks does this, but diffusers names no blocks of CogVideoX and Mochi.
    for path in model._vsa_plan.layers:
        model.get_submodule(path).compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(model, inputs), eager, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", JOINT_OR_NOT)
def test_a_compiled_transformer_is_made_sparse_and_dense_again(family: Any) -> None:
    model, inputs = family()
    dense = run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    apply_vsa(compiled, topk=0.3)
    sparse = run(compiled, inputs)
    torch.testing.assert_close(sparse, run(model, inputs), rtol=1e-4, atol=1e-5)
    assert (sparse - dense).abs().max() > 1e-4
    remove_vsa(compiled)
    torch.testing.assert_close(run(compiled, inputs), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("python", "warns"), [((3, 13, 0), True), ((3, 13, 1), False)])
def test_a_python_that_hides_changes_from_compiled_code_is_named(monkeypatch, python, warns):
    from vsa.integrations.diffusers import compiled

    monkeypatch.setattr(compiled, "PYTHON", python)
    whole, of_blocks, eager = (wan()[0] for _ in range(3))
    of_blocks.compile_repeated_blocks(backend="eager")
    for model in (torch.compile(whole, backend="eager"), of_blocks, eager):
        for change in (partial(apply_vsa, topk=0.3), remove_vsa):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                change(model)
            named = [x for x in found if "Python 3.13.0" in str(x.message)]
            assert len(named) == (warns and model is not eager)
            assert all(x.filename == __file__ for x in named)


@torch.no_grad()
def test_compiled_blocks_of_many_layers_and_steps_share_their_code() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, inputs = wan()
    apply_vsa(model, topk=0.3, dense_steps=1)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    for timestep in (900.0, 800.0, 700.0, 600.0):
        run(model, {**inputs, "timestep": torch.full((BATCH,), timestep)})
    assert counter.frame_count == 2  # dense and sparse


@torch.no_grad()
def test_a_grid_that_does_not_match_is_refused() -> None:
    model, inputs = ltx()
    apply_vsa(model, topk=0.5)
    with pytest.raises(ValueError, match=r"input is \(5, 6, 6\), 180 tokens, .* got 210"):
        run(model, {**inputs, "width": 6})
    model, inputs = ltx()
    apply_vsa(model, topk=0.5)
    del inputs["num_frames"]
    with pytest.raises(ValueError, match="num_frames, height and width are"):
        run(model, inputs)
    model, _ = wan()
    apply_vsa(model, topk=0.5)
    with pytest.raises(ValueError, match="grid is unknown"):
        model.blocks[0].attn1(torch.randn(1, 8, HEADS * HEAD_DIM))


@torch.no_grad()
@pytest.mark.parametrize("family", JOINT_OR_NOT)
def test_positional_arguments_and_other_grids_are_understood(family: Any) -> None:
    model, inputs = family()
    _, other = family((4, 4, 4))
    dense = [run(model, inputs), run(model, other)]
    apply_vsa(model, topk=1.0)
    first = model(*inputs.values(), return_dict=False)[0]
    torch.testing.assert_close(first, dense[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(model, other), dense[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dense_layers_steps_and_schedules() -> None:
    model, inputs = wan()
    dense = run(model, inputs)
    processors = [block.attn1.processor for block in model.blocks]

    apply_vsa(model, topk=1, dense_layers=[0, -1])
    assert [block.attn1.processor for block in model.blocks] == processors
    assert torch.equal(run(model, inputs), dense)

    def at(timestep: float) -> Tensor:
        return run(model, {**inputs, "timestep": torch.full((BATCH,), timestep)})

    exact = {timestep: at(timestep) for timestep in (900.0, 800.0, 700.0)}
    apply_vsa(model, topk=1, dense_steps=2)
    for _generation in range(2):
        for timestep, is_dense in ((900.0, True), (900.0, True), (800.0, True), (700.0, False)):
            assert torch.equal(at(timestep), exact[timestep]) == is_dense

    seen = []

    def schedule(layer: int, step: int) -> Any:
        seen.append((layer, step))
        return [None, 0.5, (1, 0.5), vsa.TopP(0.5)][step]

    apply_vsa(model, topk=schedule)
    assert torch.equal(at(900.0), exact[900.0])
    assert all(at(timestep).isfinite().all() for timestep in (800.0, 700.0, 600.0))
    assert seen == [(layer, step) for step in range(4) for layer in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_heads_have_budgets_of_their_own(family: Any) -> None:
    model, inputs = family()
    apply_vsa(model, tile=(2, 3, 4), topk=lambda layer, step: [(3, 6), 12][layer])
    with collect(model) as record:
        run(model, inputs)
    tiles = 12  # 3x2x2
    wanted = torch.tensor([[3 / tiles, 6 / tiles], [1.0, 1.0]])
    torch.testing.assert_close(record.density[:, 0].float(), wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_choose_by_the_score_that_was_asked_for(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = family()
    scores: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        scores.append(kwargs["score"])
        return vsa.attention(*args, **kwargs)

    monkeypatch.setattr(processors, "attention", spy)
    apply_vsa(model, tile=(2, 3, 4), topk=2)
    by_mean = run(model, inputs)
    apply_vsa(model, tile=(2, 3, 4), topk=2, score=vsa.SubBlocks(4))
    assert "score=SubBlocks(n=4)" in repr(model)
    assert not torch.equal(run(model, inputs), by_mean)
    assert set(scores) == {"mean", vsa.SubBlocks(4)}
    with pytest.raises(TypeError, match='score must be "mean" or a vsa'):
        apply_vsa(model, score=4)


@torch.no_grad()
def test_selections_are_taken_again_between_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wan()
    reused: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        reused.append(kwargs["selection"] is not None)
        return vsa.attention(*args, **kwargs)

    monkeypatch.setattr(processors, "attention", spy)
    apply_vsa(model, topk=2, refresh_every=2)
    for timestep in (900.0, 800.0, 700.0, 999.0):
        for guided in (inputs, another_video(inputs)):
            run(model, {**guided, "timestep": torch.full((BATCH,), timestep)})
    assert reused == [False] * 4 + [True] * 4 + [False] * 8

    # Taken again on the very input they were chosen for, they change nothing.
    apply_vsa(model, topk=2, refresh_every=2)
    chosen = run(model, inputs)
    model._vsa_plan.steps.timestep += 1
    assert torch.equal(run(model, inputs), chosen) and reused[-1]


@torch.no_grad()
@pytest.mark.parametrize("family", JOINT_OR_NOT)
def test_a_tail_reaches_every_layer(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = family()
    tails: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        tails.append(kwargs["tail"])
        return vsa.attention(*args, **kwargs)

    monkeypatch.setattr(processors, "attention", spy)
    without, found = (run(apply_vsa(model, topk=1, tail=tail), inputs) for tail in (False, True))
    assert tails == [False] * 2 + [True] * 2 and (found - without).abs().max() > 1e-4
    assert "tail=True" in repr(model)


def test_twice_and_never_are_well_defined() -> None:
    model, inputs = wan()
    remove_vsa(model)
    original = model.blocks[0].attn1.processor
    apply_vsa(apply_vsa(model, topk=1), topk=1.0)
    assert model.blocks[0].attn1.processor.original is original
    assert len(model._forward_pre_hooks) == 1
    remove_vsa(remove_vsa(model))
    assert model.blocks[0].attn1.processor is original
    assert not model._forward_pre_hooks and not model._forward_hooks
    run(model, inputs)


def test_copies_are_independent() -> None:
    model, inputs = wan()
    dense = run(model, inputs)
    apply_vsa(model, topk=1)
    twin = copy.deepcopy(model)
    sparse = run(model, inputs)
    remove_vsa(model)
    assert torch.equal(run(twin, inputs), sparse)
    assert torch.equal(run(remove_vsa(twin), inputs), dense)


def test_attention_backends_of_diffusers_reach_dense_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A model's choice becomes that of the process too, and stays after the model's reset.
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    model, inputs = wan()
    apply_vsa(model, topk=1, dense_steps=1)
    model.set_attention_backend("_native_math")
    run(model, inputs)
    processor = model.blocks[0].attn1.processor
    assert processor.original._attention_backend == processor._attention_backend is not None
    remove_vsa(model)
    assert model.blocks[0].attn1.processor._attention_backend is not None
    model.reset_attention_backend()


def test_fused_projections_of_wan() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=2)
    plain = run(model, inputs)
    for block in model.blocks:
        block.attn1.fuse_projections()
    torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-5)
