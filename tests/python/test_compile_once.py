# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile budgets and extents vary within few graphs, with results as in eager mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vsa

RAMP = vsa.SparsityRamp(every=1)  # 31 levels
GRIDS = [
    (4, 6, 6), (4, 6, 8), (4, 8, 6), (5, 8, 9), (6, 10, 9), (7, 12, 4),
    (8, 8, 8), (9, 9, 9), (5, 5, 5), (6, 6, 6), (4, 4, 13), (12, 4, 4),
]  # fmt: skip


def graphs(call: Callable[[Any], Any], values: Iterable[Any], **options: Any) -> int:
    """How many it takes for all values, each with the result of eager mode."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, **options)
    for value in values:
        for found, expected in zip(compiled(value), call(value), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return counter.frame_count


def video(*shape: int) -> list[torch.Tensor]:
    """q, k and v that are the same in every call."""
    numbers = torch.arange(3 * torch.Size(shape).numel() * 32, dtype=torch.float32)
    return list((numbers * 12.9898).sin().view(3, 1, *shape, 2, 16).unbind())


@pytest.mark.parametrize(
    "budgets",
    [
        [RAMP(n) for n in range(31)],
        list(range(1, 31)),
        [vsa.TopP(0.3 + 0.02 * n) for n in range(30)],
        [torch.tensor(RAMP(n)) for n in range(31)],
        [(0.5, 0.02 + 0.03 * n) for n in range(30)],
    ],
    ids=["shares", "numbers", "masses", "tensors", "per-head"],
)
def test_budgets_of_a_call_vary(budgets: list[Any]) -> None:
    q, k, v = video(4, 8, 12)

    def attend(topk: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, selection = vsa.attention(q, k, v, topk, return_selection=True, tile=(2, 4, 2))
        return out, selection.bitmap

    assert graphs(attend, budgets) <= 3


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("levels", [[RAMP(n) for n in range(31)], list(range(1, 31))])
def test_a_layer_follows_a_schedule(levels: list[float], inside: bool) -> None:
    layer = vsa.nn.VideoSparseAttention(dim=48, heads=2, tile=(2, 2, 2))
    x = torch.randn(1, 4, 6, 6, 48)
    counter = CompileCounterWithBackend("aot_eager")

    def train(n: int) -> torch.Tensor:
        layer.topk = RAMP(n) if isinstance(levels[0], float) else n + 1
        return layer(x)

    compiled = torch.compile(train if inside else layer, backend=counter, fullgraph=True)
    for n, level in enumerate(levels):
        layer.topk = level
        expected = layer(x)
        found = compiled(n if inside else x)
        assert layer.topk == level and isinstance(layer.topk, type(level))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(found.sum(), layer.to_qkv.weight)
        (wanted,) = torch.autograd.grad(expected.sum(), layer.to_qkv.weight)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("topk", [0.4, 6])
def test_resolutions_vary(topk: float) -> None:
    def of_video(grid: tuple[int, int, int]) -> tuple[torch.Tensor]:
        return (vsa.attention(*video(*grid), topk),)

    def flat(grid: tuple[int, int, int]) -> tuple[torch.Tensor]:
        q, k, v = (x.flatten(1, 3) for x in video(*grid))
        return (vsa.attention(q, k, v, topk, grid=grid),)

    for call in (of_video, flat):
        assert graphs(call, GRIDS, dynamic=True) <= 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_text_lengths_vary(dynamic: bool | None) -> None:
    def attend(length: int) -> tuple[torch.Tensor]:
        grid = vsa.Grid((4, 4, 8), prefix=length, suffix=3)
        return (vsa.attention(*video(131 + length), 0.5, grid=grid),)

    assert graphs(attend, range(1, 13), dynamic=dynamic) <= 3


def test_a_constant_budget_stays_a_constant() -> None:
    """No tensor on the CPU comes into the graph, which would keep inductor from CUDA graphs."""
    found: list[torch.fx.GraphModule] = []

    def look(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(module)
        return module.forward

    q, k, v = video(4, 8, 8)
    layer = vsa.nn.VideoSparseAttention(32, 2, topk=2, gates=None)
    x = torch.randn(1, 4, 8, 8, 32)
    for call in (lambda: vsa.attention(q, k, v, 0.3), lambda: layer(x)):
        found.clear()
        torch.compile(call, backend=look, fullgraph=True)()
        nodes = [node for module in found for node in module.graph.nodes]
        select = [node for node in nodes if "select_tiles" in str(node.target)]
        assert len(select) == 1 and list(select[0].args[3]) == [2]
        assert select[0].args[5] is None  # the numbers as a tensor
        assert not any("ones" in str(node.target) for node in nodes)


def test_the_best_tile_is_found_while_tracing() -> None:
    def attend(grid: tuple[int, int, int]) -> tuple[torch.Tensor]:
        return (vsa.attention(*video(*grid), 0.4, tile="auto"),)

    assert graphs(attend, GRIDS[:4]) == 4  # one for each grid: the tile is part of the code


def test_what_varies_is_checked_when_it_is_used() -> None:
    q, k, v = video(4, 8, 8)
    compiled = torch.compile(lambda t: vsa.attention(q, k, v, t), fullgraph=True, backend="eager")
    compiled(torch.tensor(0.5))
    for call in (compiled, lambda t: vsa.attention(q, k, v, t)):
        for share in (0.0, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"^topk as a float is a share"):
                call(torch.tensor(share))
        torch.testing.assert_close(call(torch.tensor(99)), vsa.attention(q, k, v, 1.0))
    for bad in (torch.ones(2), torch.tensor(True), torch.tensor(0.5, device="meta")):
        with pytest.raises(ValueError, match=r"^topk as a tensor must be a single number"):
            vsa.attention(q, k, v, bad)


def test_export_takes_other_grids() -> None:
    layer = vsa.nn.VideoSparseAttention(dim=32, heads=2, topk=0.5, tile=(2, 2, 2))
    auto = torch.export.Dim.AUTO
    sizes = {1: auto, 2: auto, 3: auto}
    program = torch.export.export(
        layer, (torch.randn(1, 4, 8, 10, 32),), dynamic_shapes=(sizes,)
    ).module()
    for shape in ((4, 8, 10), (6, 9, 13), (5, 20, 7)):  # more than 32 tiles, as the example has
        x = torch.randn(1, *shape, 32)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


def test_import_does_not_load_the_compiler() -> None:
    """torch._dynamo takes as long to import as torch itself; most calls and commands do without."""
    code = "import sys, vsa.cli; print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
