# SPDX-License-Identifier: Apache-2.0
"""Passes of one transformer beside each other and run again: each has its own grid and step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import vsa

pytest.importorskip("diffusers")
from integrations.tiny_transformers import BATCH, FAMILIES, mochi, run, wan
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from vsa.integrations.diffusers import apply_vsa, count_steps, denoising_step, processors
from vsa.integrations.diffusers.passes import OfThread

TIMESTEPS = (900.0, 700.0, 500.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {"topk": 0.3},
    "schedule": {"topk": lambda layer, step: 1 - 0.4 * step},
    "dense first": {"topk": 0.3, "dense_steps": 1},
}


@pytest.fixture(autouse=True)
def _one_after_the_other() -> Iterator[None]:
    yield
    torch.autograd.set_multithreading_enabled(True)


def gradients(
    settings: dict[str, Any], wrap: Callable[[Any, Callable[[Tensor], Tensor]], Any]
) -> list[Tensor]:
    """Of the weights, through three steps of sampling, as reward fine-tuning takes them."""
    torch.manual_seed(0)
    model, inputs = wan()
    apply_vsa(model, tile=(2, 2, 2), **settings)
    z = inputs["hidden_states"].requires_grad_()
    for timestep in TIMESTEPS:

        def step(z: Tensor, timestep: float = timestep) -> Tensor:
            given = {**inputs, "timestep": torch.full((BATCH,), timestep), "hidden_states": z}
            return run(model, given)

        z = z - 0.2 * wrap(model, step)(z)
    z.square().sum().backward()
    return [p.grad for p in model.blocks.parameters() if p.grad is not None]


def plainly(model: Any, step: Any) -> Any:
    return step


def whole(reentrant: bool) -> Any:
    return lambda model, step: lambda z: checkpoint(step, z, use_reentrant=reentrant)


def each_block(model: Any, step: Any) -> Any:
    if not any("Checkpoint" in type(block).__name__ for block in model.blocks):
        names = {id(block) for block in model.blocks}
        apply_activation_checkpointing(model, check_fn=lambda module: id(module) in names)
    return step


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "wrap", [whole(False), whole(True), each_block], ids=["whole", "reentrant", "blocks"]
)
def test_external_checkpointing_recomputes_its_own_pass_or_raises(settings: str, wrap: Any) -> None:
    expected = gradients(SETTINGS[settings], plainly)
    if wrap is each_block and settings != "constant":
        with pytest.raises(RuntimeError, match=r"^a sparse layer is recomputed .* cannot be told"):
            gradients(SETTINGS[settings], wrap)
        return
    found = gradients(SETTINGS[settings], wrap)
    assert len(found) == len(expected) > 10
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrap", [whole(False), each_block])
def test_stored_selections_are_not_recomputed(wrap: Any) -> None:
    with pytest.raises((RuntimeError, ValueError), match="refresh_every must be 1 where"):
        gradients({"topk": 0.3, "refresh_every": 2}, wrap)


def test_a_pass_in_between_changes_no_gradient() -> None:
    """Another grid of as many tokens, run between a forward and its backward."""
    model, inputs = wan()
    apply_vsa(model, topk=0.3, tile=(2, 2, 2))
    out = run(model, inputs)
    expected = torch.autograd.grad(out.square().sum(), list(model.blocks.parameters()))
    other = inputs["hidden_states"].transpose(3, 4).contiguous()

    def step(z: Tensor) -> Tensor:
        return run(model, {**inputs, "hidden_states": z})

    z = inputs["hidden_states"].clone().requires_grad_()
    out = checkpoint(step, z, use_reentrant=False)
    with torch.no_grad():
        step(other)
    found = torch.autograd.grad(out.square().sum(), list(model.blocks.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.__defaults__])
def test_two_threads_keep_their_grids_apart(family: Any) -> None:
    torch.manual_seed(0)
    model, inputs = family()
    others = {"first": inputs, "second": family((4, 8, 5))[1]}
    apply_vsa(model, topk=0.3, tile=(2, 2, 2), dense_steps=1)

    def denoise(given: dict[str, Any]) -> list[Tensor]:
        times = TIMESTEPS[::-1] if model._vsa_plan.family.rising else TIMESTEPS
        whole = given["timestep"]
        return [run(model, {**given, "timestep": torch.full_like(whole, t)}) for t in times]

    alone = {name: denoise(given) for name, given in others.items()}
    wrong: list[str] = []
    barrier = threading.Barrier(2)

    def request(name: str) -> None:
        with torch.no_grad():
            for _ in range(4):
                barrier.wait()
                found = denoise(others[name])
                same = [
                    torch.allclose(a, b, atol=1e-5) for a, b in zip(found, alone[name], strict=True)
                ]
                wrong.extend([name] * (not all(same)))

    threads = [threading.Thread(target=request, args=(name,)) for name in others]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_what_a_thread_has_is_no_default_of_its_class() -> None:
    """torch.compile of PyTorch 2.11 reads such a default whatever the thread has set.

    Compiled blocks then knew no grid, though their transformer had told them. 2.13 reads what was
    set. findings/default_of_a_thread.sh shows both.
    """
    kinds = OfThread.__subclasses__()
    assert len(kinds) >= 5
    for kind in kinds:
        values = {n for n, v in vars(kind).items() if not callable(v) and not n.startswith("__")}
        assert not {n for n in values if not isinstance(vars(kind)[n], property)}, kind


def steps_of(model: Any, inputs: dict[str, Any], times: Any, seen: list[int]) -> list[int]:
    seen.clear()
    with torch.no_grad():
        for time in times:
            run(model, {**inputs, "timestep": torch.full((BATCH,), time)})
    return seen[::2]  # of two layers


@pytest.mark.parametrize("family", [wan, mochi])
def test_steps_are_counted_in_the_direction_of_the_family(family: Any) -> None:
    model, inputs = family()
    seen: list[int] = []
    apply_vsa(model, topk=lambda layer, step: seen.append(step) or 0.5)
    times = [0.0, 300.0, 300.0, 999.0] if family is mochi else [999.0, 300.0, 300.0, 0.0]
    for _generation in range(2):
        assert steps_of(model, inputs, times, seen) == [0, 1, 1, 2]


def test_a_pair_of_transformers_shares_the_steps_of_a_generation() -> None:
    (high, inputs), (low, _) = wan(), wan()
    seen: list[int] = []
    both = apply_vsa([high, low], topk=lambda layer, step: seen.append(step) or 0.5)
    assert both == [high, low]
    for _generation in range(2):
        assert steps_of(high, inputs, [999.0, 900.0], seen) == [0, 1]
        assert steps_of(low, inputs, [800.0, 700.0], seen) == [2, 3]
    with pytest.raises(ValueError, match="transformer must be a transformer or several"):
        apply_vsa([])


def test_a_step_can_be_said() -> None:
    model, inputs = wan()
    seen: list[int] = []
    apply_vsa(model, topk=lambda layer, step: seen.append(step) or 0.5)
    for step in range(3):  # a model of one step, or rolling noise
        with denoising_step(step):
            assert steps_of(model, inputs, [999.0, 999.0], seen) == [step, step]
    pipe = type("Pipeline", (), {"num_timesteps": 3})()
    for _generation in range(2):
        for step in range(3):
            assert steps_of(model, inputs, [999.0 - step], seen) == [step]
            assert count_steps(pipe, step, None, {"latents": 1}) == {"latents": 1}
    with pytest.raises(ValueError, match="step must be at least 0"), denoising_step(-1):
        pass


def test_steps_that_look_alike_are_said_to() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=0.5, dense_steps=2)
    with pytest.warns(UserWarning, match="timestep values were equal in 5 calls"):
        steps_of(model, inputs, [999.0] * 5, [])
    apply_vsa(model, topk=0.5, dense_steps=2)
    with torch.no_grad(), pytest.warns(UserWarning, match="equal in 2 calls"):
        for _ in range(2):  # of a model of one step, on other latents each time
            run(model, {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])})
    apply_vsa(model, topk=0.5, dense_steps=2)
    with pytest.warns(UserWarning, match="timestep 700 is the first, .* in one list"):
        steps_of(model, inputs, [700.0], [])


@pytest.mark.filterwarnings("error:timestep")
@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])  # whole numbers are UniPC's
def test_timesteps_that_were_rounded_to_one_are_two_steps(
    guidance: int, dtype: torch.dtype
) -> None:
    model, inputs = wan()
    seen: list[int] = []
    apply_vsa(model, topk=lambda layer, step: seen.append(step) or 0.5)
    texts = [torch.randn(BATCH, 5, 16) for _ in range(guidance)]
    for _generation in range(2):
        seen.clear()
        for time in (999.9, 999.1, 997.0, 992.0, 990.0):  # some of them are one
            latents = torch.randn_like(inputs["hidden_states"])
            timestep = torch.full((BATCH,), time).to(dtype)
            for text in texts:
                given = {"hidden_states": latents, "encoder_hidden_states": text}
                with torch.no_grad():
                    run(model, {**inputs, **given, "timestep": timestep})
        assert seen[::2] == [step for step in range(5) for _ in texts]


def test_a_generation_that_broke_off_does_not_shift_the_next() -> None:
    model, inputs = wan()
    seen: list[int] = []
    apply_vsa(model, topk=lambda layer, step: seen.append(step) or 0.5)
    pipe = type("Pipeline", (), {"num_timesteps": 4})()
    for step in range(2):
        assert steps_of(model, inputs, [999.0 - step], seen) == [step]
        count_steps(pipe, step, None, {})
    for step in range(4):  # timesteps fall back
        assert steps_of(model, inputs, [999.0 - step], seen) == [step]
        count_steps(pipe, step, None, {})
    for step in range(2):  # and where they are constant, the callback is told too little
        steps_of(model, inputs, [999.0], seen)
        count_steps(pipe, step, None, {})
    steps_of(model, inputs, [999.0], seen)
    with pytest.raises(RuntimeError, match="step 0 of the pipeline was taken for step 2"):
        count_steps(pipe, 0, None, {})
    for step in range(4):
        assert steps_of(model, inputs, [999.0], seen) == [step]
        count_steps(pipe, step, None, {})


@torch.no_grad()
def test_a_pair_takes_no_selection_of_the_generation_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (high, inputs), (low, _) = wan(), wan()
    reused: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        reused.append(kwargs["selection"] is not None)
        return vsa.attention(*args, **kwargs)

    monkeypatch.setattr(processors, "attention", spy)
    apply_vsa([high, low], topk=2, refresh_every=3)
    for _generation in range(2):
        reused.clear()
        for model, times in ((high, [999.0, 950.0]), (low, [850.0, 700.0, 600.0])):
            steps_of(model, inputs, times, [])
        # the low one begins with step 2, which would take again what step 0 chose
        assert reused[::2] == [False, True, False, False, True]


def test_selections_made_under_inference_mode_serve_training() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=2, refresh_every=2)
    at = [{**inputs, "timestep": torch.full((BATCH,), time)} for time in (999.0, 900.0)]
    with torch.inference_mode():
        run(model, at[0])
    mixed = run(model, at[1])
    mixed.sum().backward()
    grad = model.blocks[0].attn1.to_q.weight.grad.clone()
    model.zero_grad()
    apply_vsa(model, topk=2, refresh_every=2)
    run(model, at[0])
    plain = run(model, at[1])
    plain.sum().backward()
    assert torch.equal(mixed, plain) and torch.equal(grad, model.blocks[0].attn1.to_q.weight.grad)


def test_selections_do_not_pile_up_where_timesteps_are_constant() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=2, refresh_every=2)
    with pytest.warns(UserWarning, match="equal in 5 calls"):
        steps_of(model, inputs, [999.0] * 12, [])
    assert len(model._vsa_plan.stores._stores) <= 2 * 4


def test_a_refused_call_leaves_the_transformer_as_it_was() -> None:
    model, inputs = wan()
    apply_vsa(model, topk=0.3)
    plan, before = model._vsa_plan, run(model, inputs)
    stored = copy.deepcopy(model.state_dict())
    for parameter in model.blocks[1].attn1.parameters():
        parameter.requires_grad_(False)
    for name in ("to_q", "to_k", "to_v"):
        layer = getattr(model.blocks[1].attn1, name)
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
        layer.bias = None
    model.blocks[1].attn1.to_out[0] = torch.nn.Identity()
    model.blocks[1].attn1.norm_q = model.blocks[1].attn1.norm_k = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"gates cannot be made for blocks\.1.* torch\.uint8"):
        apply_vsa(model, topk=0.3, gates="coarse")
    assert model._vsa_plan is plan and not hasattr(model.blocks[0].attn1, "to_gate_compress")
    del stored, before


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_gates_compute_in_the_type_of_the_layer(storage: torch.dtype) -> None:
    model, inputs = wan()
    apply_vsa(model, topk=0.3, tile=(2, 2, 2))
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    with torch.no_grad():
        expected = run(model, inputs)
        apply_vsa(model, topk=0.3, tile=(2, 2, 2), gates="coarse")
        torch.testing.assert_close(run(model, inputs), expected)  # gates are zero
    assert model.blocks[0].attn1.to_gate_compress.weight.dtype == torch.float32


def whole_gradients(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of the weights of all blocks, through one pass in the type of the weights."""
    parameters = list(model.blocks.parameters())
    given = {
        name: value.to(parameters[0].dtype) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    return torch.autograd.grad(run(model, given).square().sum(), parameters)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_transformer_with_checkpointing_is_one_graph(fullgraph: bool) -> None:
    model, inputs = wan()
    apply_vsa(model, topk=0.3, tile=(2, 2, 2))
    exact = whole_gradients(copy.deepcopy(model).double(), inputs)
    model.enable_gradient_checkpointing()
    eager = whole_gradients(model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = whole_gradients(torch.compile(model, backend=counter, fullgraph=fullgraph), inputs)
    for truth, a, b in zip(exact, eager, compiled, strict=True):
        # Compiled operators sum in another order than eager ones. Both round fp32, not more.
        allowed = min(2 * (a - truth).norm(), 2e-6 * truth.norm())
        assert (b - truth).norm() <= allowed
    assert counter.frame_count == 1
