# SPDX-License-Identifier: Apache-2.0
"""Training of vsa train: kinds of attention, pairing, resuming, counted operations, learning."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from training.small import settings

import vsa
from vsa.training import attention, checkpoints, flow, probes
from vsa.training.costs import step_cost
from vsa.training.model import SIZES, TOKEN_NUMBERS, VideoTransformer
from vsa.training.run import Run

CPU = torch.device("cpu")
GRID = vsa.Grid((4, 8, 12))
EVERY_KIND = tuple(attention.KINDS)


def model(kind, topk=2, size="tiny", grid=GRID, seed=0):
    return VideoTransformer(size, kind, grid, topk, seed)


def inputs(batch=2, grid=GRID):
    torch.manual_seed(7)
    return torch.randn(batch, grid.tokens, TOKEN_NUMBERS), torch.rand(batch)


def trained(found):
    """Not the untrained model, which answers zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return found


def test_a_tiny_model_learns():
    run = Run(settings(clips=64, held_out=8, every=30), CPU)
    run.train(60, None)
    video = torch.cat([batch.video for batch in run.data.held_out])
    time = torch.cat([batch.time for batch in run.data.held_out])
    variance = video.var()
    # What knows mean and variance of the colours, and looks at each number alone.
    alone = (variance / ((1 - time).square() * variance + time.square())).mean().item()
    for kind in ("full", "vsa"):
        first, *_, last = (row for row in run.rows if row["kind"] == kind)
        zero = run.baseline["generated"]
        assert_close(first["held_out"], zero)  # an untrained model predicts zero
        assert last["held_out"] < 0.85 * alone < 0.85 * zero and last["train"] < zero


def test_kinds_start_alike_and_see_the_same():
    models = {kind: dict(model(kind).named_parameters()) for kind in EVERY_KIND}
    for (kind, mine), (_, full) in itertools.product(models.items(), [("full", models["full"])]):
        shared = mine.keys() & full.keys()
        assert shared == full.keys(), kind
        assert all(torch.equal(mine[name], full[name]) for name in shared), kind
        assert all("to_gate" in name for name in mine.keys() - shared)
    assert not torch.equal(
        *(dict(model("full", seed=s).named_parameters())["patch_in.weight"] for s in (0, 1))
    )


def test_with_every_tile_sparse_training_is_dense_training():
    run = Run(settings(kinds=("full", "vsa", "fine", "abrupt"), topk=1.0, dense_steps=0), CPU)
    run.train(1, None)
    losses = {row["kind"]: row["held_out"] for row in run.rows if row["step"] == 1}
    for kind in ("vsa", "fine", "abrupt"):  # gates of the first two steps: fine 1, coarse 0
        assert_close(losses[kind], losses["full"], rtol=1e-4, atol=0)


def test_dense_and_coarse_attention_are_parts_of_vsa():
    x = torch.randn(2, GRID.tokens, 64)
    dense, sparse = (
        attention.make("full", 64, 1, GRID, 1.0, 0, 0),
        vsa.nn.VideoSparseAttention(64, 1, topk=1.0, gates=None),
    )
    sparse.load_state_dict(dense.state_dict())
    assert_close(dense(x), sparse(x, GRID), atol=1e-5, rtol=1e-5)
    coarse = attention.make("coarse", 64, 1, GRID, 1.0, 0, 0)
    both = vsa.nn.VideoSparseAttention(64, 1, topk=1.0, gates="both")
    both.load_state_dict(coarse.state_dict(), strict=False)
    torch.nn.init.zeros_(both.to_gate_fine.bias)
    assert_close(coarse(x), both(x, GRID), atol=1e-5, rtol=1e-5)


def test_fixed_tiles_cost_as_much_as_chosen_ones():
    grid = vsa.Grid((8, 16, 16))
    near = attention.nearest_tiles(grid, 5)
    assert (near.sum(1) == 5).all() and near.diagonal().all()
    inner = grid.tiles[1] + 1  # tile (0, 1, 1): both above and below are nearer than corners
    assert near[inner].nonzero().flatten().tolist() == [
        inner - 4,
        inner - 1,
        inner,
        inner + 1,
        inner + 4,
    ]
    drawn = attention.random_tiles(grid, 3, 5, seed=0)
    assert (drawn.sum(-1) == 5).all() and drawn.diagonal(dim1=1, dim2=2).all()
    assert not torch.equal(drawn[0], drawn[1])
    layers = [block.attention.bitmap for block in model("random", topk=3).blocks]
    assert not torch.equal(*layers)
    x, time = inputs()
    for kind in attention.FIXED:
        found = trained(model(kind, topk=2))
        mask = found.layers[0].attention.selection(2).mask()
        out = found(x, time)
        for block in found.layers:  # the same tiles, as a mask of dense attention
            mask = block.attention.selection(2).mask()
            tile = GRID.tile_of_token()
            block.attention.forward = masked(block.attention, mask[:, :, tile][..., tile])
        assert_close(found(x, time), out, atol=1e-4, rtol=1e-4)


def masked(layer, mask):
    def forward(x, grid, rotary):
        q, k, v = (each.transpose(1, 2) for each in attention._projected(layer, x, rotary))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return layer.to_out(out.transpose(1, 2).flatten(-2))

    return forward


def test_positions_matter_relative_to_each_other_alone():
    position = model("full").layers[0].position
    q, k = torch.randn(2, 1, 1, 1, 64).expand(-1, -1, GRID.tokens, -1, -1)
    q, k = position(q, k)
    scores = (q[0, :, 0] @ k[0, :, 0].T).view(*GRID.shape, *GRID.shape)
    assert_close(scores[0, 1, 2, 2, 3, 5], scores[1, 4, 3, 3, 6, 6])
    assert abs(scores[0, 1, 2, 2, 3, 5] - scores[0, 1, 2, 2, 4, 5]) > 1e-3


def test_ramp_and_abrupt_begin_dense_and_end_at_the_budget():
    recipe = settings(topk=0.25, dense_steps=3, ramp_every=2, ramp_step=0.3)
    ramp = [recipe.density_at("ramp", step) for step in range(12)]
    assert_close(ramp, [1.0] * 3 + [0.7] * 2 + [0.4] * 2 + [0.25] * 5)
    abrupt = [recipe.density_at("abrupt", step) for step in range(5)]
    assert abrupt == [1.0] * 3 + [0.25] * 2
    run = Run(settings(kinds=("ramp", "abrupt"), topk=1, ramp_step=0.5, every=100), CPU)
    seen = {kind: [] for kind in run.arms}

    def watch(step, rows):
        for kind, arm in run.arms.items():
            seen[kind].append(arm.model.layers[0].attention.topk)

    run.train(5, None, watch)  # one look before the first step, and one after the last
    assert seen == {
        "ramp": [1.0, 1.0, 1.0, 0.5, 0.25, 0.25, 0.25],
        "abrupt": [1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.25],
    }


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path, ema):
    # Evaluations take more than steps: few, on few clips.
    recipe = settings(kinds=("full", "vsa", "ramp"), ema=ema, every=4, held_out=2)
    whole, half, rest = Run(recipe, CPU), Run(recipe, CPU), Run(recipe, CPU)
    whole.train(6, None)
    half.train(3, None)  # stops between two evaluations
    checkpoints.save_whole(half, tmp_path)
    checkpoints.load_whole(rest, tmp_path)
    rest.train(6, None)
    for kind, arm in whole.arms.items():
        for mine, theirs in zip(
            arm.model.parameters(), rest.arms[kind].model.parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)
    for mine, theirs in zip(whole.rows, rest.rows, strict=True):
        assert {**mine, "train_ms": 0} == {**theirs, "train_ms": 0}
    with pytest.raises(ValueError, match="seed must be 0 as in the run that is resumed"):
        checkpoints.load_whole(Run(replace(recipe, seed=1), CPU), tmp_path)


def test_averaged_weights_are_evaluated_and_left_alone():
    run = Run(settings(kinds=("full",), ema=0.5, every=100), CPU)
    arm = run.arms["full"]
    start = arm.model.time_in[0].weight.detach().clone()
    run.train(1, None)
    now = arm.model.time_in[0].weight.detach().clone()
    with arm.averaged():
        assert_close(arm.model.time_in[0].weight.data, (start + now) / 2)
    assert torch.equal(arm.model.time_in[0].weight, now)


def test_weights_are_kept_in_bf16_and_start_another_run(tmp_path):
    run = Run(settings(kinds=("full",)), CPU)
    run.train(2, None)
    checkpoints.save_weights(run, tmp_path)
    file = tmp_path / "weights-full.pt"
    assert file.stat().st_size < 2.3 * run.parameters["full"] + 20_000
    found, recipe = checkpoints.load_model(file)
    assert recipe == run.settings and found.kind == "full"
    x, time = inputs(grid=recipe.video)
    assert_close(found(x, time), run.arms["full"].model(x, time), atol=0.02, rtol=0.02)
    sparse = Run(settings(kinds=("abrupt",), topk=1.0), CPU)
    checkpoints.start_from(sparse, file)
    assert_close(sparse.arms["abrupt"].model(x, time), found(x, time), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"weights-vsa\.pt must be a file of vsa train"):
        checkpoints.start_from(Run(settings(kinds=("vsa",)), CPU), tmp_path)


def test_counted_operations_are_those_of_flops_and_of_the_counter():
    x, time = inputs()
    costs = {}
    for kind in EVERY_KIND:
        found = trained(model(kind))
        density = settings(grid=GRID.shape).density_at(kind, 100)
        costs[kind] = step_cost(found, len(x), density)
        with FlopCounterMode(display=False) as counter:
            flow.clip_losses(found, x.requires_grad_(), x.detach(), time).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
        # The counter leaves out what no gradient is asked for: none here but that of the time.
        assert 0.99 < linear / costs[kind].rest <= 1.0, kind
    cost = vsa.flops(GRID, SIZES["tiny"].heads * SIZES["tiny"].depth, 64, 2, batch=2)
    assert costs["full"].attention == cost.full
    assert costs["vsa"].attention == costs["ramp"].attention == cost.sparse
    assert costs["window"].attention == costs["random"].attention == cost.fine
    assert cost.fine < costs["fine"].attention < cost.sparse
    assert costs["coarse"].attention == cost.coarse + cost.combine


def test_probes_see_recall_and_gates():
    batch = Run(settings(), CPU).data.held_out[0]
    for kind in EVERY_KIND:
        found = probes.probe(model(kind, grid=settings().video), [batch], 4)
        window = kind in attention.FIXED
        assert len(found["recall"]) == 2 and (window or min(found["recall"]) > 0.999), kind
        assert all(
            low <= mean for low, mean in zip(found["recall_low"], found["recall"], strict=True)
        )
        assert found.get("gate_fine") == ([1.0, 1.0] if kind == "vsa" else None)
        gates = {"vsa": [0.0] * 2, "coarse": [1.0] * 2, "ramp": [0.0] * 2, "abrupt": [0.0] * 2}
        assert found.get("gate_coarse") == gates.get(kind)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_blocks_compile_whole(kind):
    x, time = inputs()
    found = trained(model(kind))
    plain = found(x, time)
    for block in found.blocks:
        block.compile(fullgraph=True, backend="eager")
    assert_close(found(x, time), plain)


def test_fsdp2_shards_it_block_by_block(tmp_path):
    x, time = inputs()
    plain, sharded = trained(model("vsa")), trained(model("vsa"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        losses = [flow.clip_losses(each, x, x.flip(1), time).mean() for each in (plain, sharded)]
        assert_close(losses[1], losses[0])
        for loss in losses:
            loss.backward()
        for mine, theirs in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert_close(theirs.grad.full_tensor(), mine.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kinds": ("full", "sparse")}, "kinds must be of full, vsa,.*but one is 'sparse'"),
        ({"kinds": ("vsa", "vsa")}, "kinds must be named once each"),
        ({"size": "1b"}, "size must be one of tiny, 10m, 25m, 60m, but it is '1b'"),
        ({"grid": (4, 8, 10)}, "grid must consist of whole tiles of 4x4x4 tokens.*4x8x10"),
        ({"topk": 0}, "topk must be"),
        ({"real": 1.5}, "real must be a share from 0 to 1, but it is 1.5"),
        ({"ema": 1.0}, r"ema must be a decay in \[0, 1\), but it is 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, but it is float16"),
        ({"ramp_step": 0.0}, "ramp_step"),
    ],
)
def test_bad_settings_are_named_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(**change)
