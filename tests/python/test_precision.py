# SPDX-License-Identifier: Apache-2.0
"""Low precision: how far from fp64, what it does not fit, and that all else is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vsa
from vsa.backends import torch_low_precision as simulated
from vsa.verify import dense, low_precision
from vsa.verify.low_precision import OFFSETS, OUT_SHARP
from vsa.verify.low_precision import OUT as ALLOWED

GRID = vsa.Grid((8, 8, 16))
precisions = pytest.mark.parametrize("precision", ["int8", "fp8"])
head_dims = pytest.mark.parametrize("head_dim", [64, 128])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k and v of N(0,1)."""
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def outliers(k: Tensor) -> Tensor:
    """Keys with offsets of 10 to 20 in a few channels, as models have them."""
    offset = torch.zeros(k.shape[-1])
    offset[list(OFFSETS)] = torch.tensor(list(OFFSETS.values()))
    return (k.float() + offset).to(k.dtype)


def error(out: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((out.double() - truth).norm() / truth.norm()).item()


def exactly(q: Tensor, k: Tensor, v: Tensor, selection: vsa.Selection, **options: Any) -> Any:
    """Out and log-sum-exp in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    return vsa.block_sparse_attention(q, k, v, selection, return_lse=True, **options)


@precisions
@head_dims
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "outliers", "sharp", "kept"])
def test_error_is_as_small_as_promised(precision, head_dim, dtype, kind) -> None:
    q, k, v = draw(1, GRID.length, 2, head_dim, dtype=dtype)
    if kind == "outliers":
        k = outliers(k)
    topk = {"normal": 8, "outliers": 8, "sharp": 8, "kept": 1.0}[kind]
    if kind == "sharp":
        q = q * 3
    out, selection, lse = vsa.attention(
        q, k, v, topk, grid=GRID, precision=precision, return_selection=True, return_lse=True
    )
    truth, truth_lse = exactly(q, k, v, selection)
    allowed = (OUT_SHARP if kind == "sharp" else ALLOWED)[precision]
    found = error(out, truth)
    # A hundredth is what 16 bits cost: less would mean that nothing was rounded to eight.
    assert 0.01 < found <= allowed
    off = (lse - truth_lse).abs()
    if kind != "sharp":  # errors of scores grow with them, and the log-sum-exp follows
        assert off.square().mean().sqrt() < 0.01
        assert off.max() < (0.02 if precision == "int8" else 0.03)
    assert out.dtype == dtype and lse.dtype == torch.float32


@precisions
def test_offsets_of_channels_cost_nothing(precision) -> None:
    q, k, v = draw(1, GRID.length, 1, 128)
    options = {"grid": GRID, "precision": precision, "selection": vsa.select(q, k, 8, grid=GRID)}
    plain, shifted = (
        error(
            vsa.attention(q, keys, v, None, **options),
            exactly(q, keys, v, options["selection"])[0],
        )
        for keys in (k, outliers(k))
    )
    assert shifted < 1.05 * plain


def test_int8_keeps_its_accuracy_where_attention_is_sharp() -> None:
    q, k, v = draw(1, GRID.length, 2, 128)
    errors = []
    for factor in (1, 2, 4):
        selection = vsa.select(q * factor, k, 8, grid=GRID)
        out = vsa.block_sparse_attention(q * factor, k, v, selection, precision="int8")
        errors.append(error(out, exactly(q * factor, k, v, selection)[0]))
    assert max(errors) <= ALLOWED["int8"], errors


@precisions
@pytest.mark.parametrize("case", low_precision.CASES, ids=lambda case: case.name)
def test_all_kinds_of_calls_agree_with_fp64(case: low_precision.Case, precision: str) -> None:
    shares = low_precision.shares(case, precision, backend="torch")
    assert max(shares.values()) <= 1, shares


def test_the_rule_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in low_precision.CASES if case.name == "longer")
    forward = simulated.forward
    faults = {
        "out": lambda out, lse: (1.05 * out, lse),
        "lse": lambda out, lse: (out, lse + 0.03),
        "nothing": lambda out, lse: (out, lse.index_fill(2, torch.tensor([5]), -torch.inf)),
    }
    for name, fault in faults.items():
        monkeypatch.setattr(simulated, "forward", lambda *a, fault=fault: fault(*forward(*a)))
        shares = low_precision.shares(case, "int8", backend="torch")
        assert not shares[name] <= 1, name
    monkeypatch.setattr(
        simulated, "forward", lambda *a: (torch.nan * forward(*a)[0], forward(*a)[1])
    )
    assert not low_precision.shares(case, "int8", backend="torch")["out"] <= 1


@precisions
def test_rows_that_attend_nothing_are_zeros(precision) -> None:
    q, k, v = draw(1, GRID.length, 2, 64)
    q[0, 0] = torch.nan  # lies in the first tile
    k[0, -1] = torch.inf
    mask = torch.zeros(1, 2, GRID.num_tiles, GRID.num_tiles, dtype=torch.bool)
    mask[:, :, 1, 2] = True
    selection = vsa.Selection.from_mask(mask)
    out, lse = vsa.block_sparse_attention(
        q, k, v, selection, grid=GRID, precision=precision, return_lse=True
    )
    attends = GRID.to_tiles(torch.ones(1, GRID.length, 1, 1)).clone()
    attends[:] = 0
    attends[:, 1] = 1
    attends = GRID.from_tiles(attends)[0, :, 0, 0].bool()
    assert (out[0, ~attends] == 0).all() and (lse[..., ~attends] == -torch.inf).all()
    assert out[0, attends].isfinite().all() and lse[..., attends].isfinite().all()


@precisions
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_infinity_and_nan_stay_where_they_are_in_native(precision, value, where) -> None:
    tensors = dict(zip("qkv", draw(1, GRID.length, 2, 64), strict=True))
    tensors[where][0, 700, 1, 5] = value
    clean = dict(zip("qkv", draw(1, GRID.length, 2, 64), strict=True))
    selection = vsa.select(clean["q"], clean["k"], 6, grid=GRID)
    out, native = (
        vsa.block_sparse_attention(*tensors.values(), selection, precision=name)
        for name in (precision, "native")
    )
    finite, of_native = out.isfinite(), native.isfinite()
    assert not of_native.all()
    assert not finite[~of_native].any()  # never a number in their place
    # A key of minus infinity can leave numbers behind in native, by a weight of zero.
    expected = of_native if where != "k" or value != value else finite
    assert torch.equal(finite, expected)
    attended = selection.mask()[0, 1]
    tile = GRID.to_tiles(torch.arange(GRID.length).view(1, -1, 1, 1)).flatten(1)[0] == 700
    tile = tile.view(GRID.num_tiles, -1).any(-1).nonzero().item()
    rows = GRID.to_tiles(out)[0, :, :, 1].isfinite().all(-1).all(-1)
    reached = torch.zeros(GRID.num_tiles, dtype=torch.bool)
    reached[tile] = True
    assert torch.equal(~rows, reached if where == "q" else attended[:, tile])
    assert finite[:, :, 0].all()  # the other head


@precisions
def test_an_outlier_among_values_leaves_the_others_as_exact(precision) -> None:
    q, k, v = draw(1, GRID.length, 1, 64)
    v[0, 5, 0, 7] = 1e4  # its channel alone gets a coarser scale
    selection = vsa.select(q, k, 8, grid=GRID)
    out = vsa.block_sparse_attention(q, k, v, selection, precision=precision)
    truth, _ = exactly(q, k, v, selection)
    others = [channel for channel in range(64) if channel != 7]
    assert error(out[..., others], truth[..., others]) <= ALLOWED[precision]


@precisions
def test_values_of_unselected_tiles_and_invalid_text_never_matter(precision) -> None:
    grid = vsa.Grid((4, 4, 12), prefix=5)
    q, k, v = draw(2, grid.length, 2, 64)
    valid = torch.tensor([[True, False, True, True, False], [False] * 5])
    mask = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    mask[..., 0] = True
    options = {"grid": grid, "precision": precision, "text_valid": valid}
    selection = vsa.Selection.from_mask(mask)
    truth, _ = exactly(q, k, v, selection, grid=grid, text_valid=valid)
    for junk in (torch.nan, torch.inf):
        dirty_k, dirty_v, dirty_q = k.clone(), v.clone(), q.clone()
        for x in (dirty_k, dirty_v):
            x[:, 5:].view(2, 4, 4, 12, 2, 64)[:, :, :, 8:] = junk  # the last tile
        for x in (dirty_q, dirty_k, dirty_v):
            x[:, :5][~valid] = junk
        out = vsa.block_sparse_attention(dirty_q, dirty_k, dirty_v, selection, **options)
        # Text queries attend every tile, so they alone may see the junk.
        assert error(out[:, 5:], truth[:, 5:]) <= ALLOWED[precision]
        assert (out[:, :5][~valid] == 0).all()


@precisions
@pytest.mark.parametrize("tiles", [8, 64, 200])
def test_error_does_not_grow_with_the_number_of_kept_tiles(precision, tiles) -> None:
    grid = vsa.Grid((1, 1, 64 * tiles), tile=(1, 1, 64))
    (q, k, v), few = draw(1, grid.length, 1, 64), vsa.Grid((1, 1, 64), tile=(1, 1, 64))
    q = q[:, :64]
    out, selection = vsa.attention(
        q, k, v, 1.0, grid=few, kv_grid=grid, precision=precision, return_selection=True
    )
    assert error(out, exactly(q, k, v, selection)[0]) <= ALLOWED[precision]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    precision=st.sampled_from(["int8", "fp8"]),
    video=st.tuples(*[st.integers(1, 9)] * 3),
    tile=st.sampled_from([(4, 4, 4), (3, 5, 4), (1, 2, 3), (1, 1, 64), (2, 2, 4)]),
    text=st.tuples(st.integers(0, 70), st.integers(0, 3)),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    topk=st.one_of(st.integers(1, 5), st.floats(0.1, 1)),
    magnitude=st.sampled_from([2.0**-40, 1e-3, 1.0, 1e3]),
)
def test_any_grid_agrees_with_fp64(seed, precision, video, tile, text, heads, topk, magnitude):
    grid = vsa.Grid(video, tile=tile, prefix=text[0], suffix=text[1])
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, grid.length, heads, 64, generator=generator)

    q, k, v = (
        x.bfloat16() for x in (normal(heads[0]), normal(heads[1]), normal(heads[1]) * magnitude)
    )
    out, selection, lse = vsa.attention(
        q, k, v, topk, grid=grid, precision=precision, return_selection=True, return_lse=True
    )
    truth, truth_lse = exactly(q, k, v, selection)
    # Of rows with few keys the error is that of a few roundings: 2^-4 each of weights and values.
    assert error(out, truth) < 0.12
    assert (lse - truth_lse).abs().max() < 0.2


@given(exponent=st.floats(-40, 0))
@settings(deadline=None)
def test_weights_are_e4m3_near_the_power_of_two(exponent) -> None:
    weight = simulated.line(torch.tensor([exponent])).item()
    assert torch.tensor(weight).to(torch.float8_e4m3fn).float().item() == weight
    exact = simulated.TOP * 2.0**exponent
    # Linear mantissas are from 4 % too small to 2 % too large beside that of the maximum, and
    # rounded by up to half a unit of 1/8; below 2^-6 numbers go down to zero within one power of
    # two.
    assert abs(weight - exact) <= max(0.105 * exact, 1.1 * 2.0**-7)


def test_weights_have_no_bias_beside_that_of_the_maximum() -> None:
    exponents = torch.linspace(-12, -4, 100_001, dtype=torch.float64)
    ratio = simulated.line(exponents) / (simulated.TOP * exponents.exp2())
    assert abs(ratio.mean() - 1) < 1e-3
    assert simulated.line(torch.zeros(1)) == simulated.TOP


@precisions
def test_compiled_calls_autocast_and_strides_give_the_same_bits(precision) -> None:
    q, k, v = draw(1, 4, 4, 8, 2, 64)

    def call(*tensors: Tensor) -> Tensor:
        return vsa.attention(*tensors, 1, precision=precision)

    expected = call(q, k, v)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(q.float(), k, v), expected)
    fused = torch.stack((q, k, v), dim=4)
    assert torch.equal(call(*fused.unbind(4)), expected)
    leaf = q.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(call(leaf, k, v), expected)
    assert torch.equal(vsa.attention(q, k, v, 1, precision="native"), vsa.attention(q, k, v, 1))


@precisions
@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.7])
def test_any_scale(precision, scale) -> None:
    q, k, v = draw(1, GRID.length, 1, 64)
    selection = vsa.select(q, k, 6, grid=GRID, scale=scale)
    out = vsa.block_sparse_attention(q, k, v, selection, scale=scale, precision=precision)
    truth, _ = exactly(q, k, v, selection, scale=scale)
    # Scores of deviation 14, of which e4m3 keeps 4 bits.
    allowed = 0.35 if scale == 1.7 and precision == "fp8" else 0.11
    assert error(out, truth) < allowed


def test_a_large_score_does_not_overflow() -> None:
    q, k, v = draw(1, GRID.length, 1, 128)
    selection = vsa.select(q, k, 6, grid=GRID)
    for factor in (1e4, 1e15):
        for precision in ("int8", "fp8"):
            out = vsa.block_sparse_attention(q * factor, k, v, selection, precision=precision)
            assert out.isfinite().all()
            # Each row takes the value of one key, if not always the right one.
            assert out.abs().max() <= v.abs().max() * 1.01


def test_dense_attention_in_fp64_is_another_oracle() -> None:
    q, k, v = draw(1, GRID.length, 2, 64)
    out, selection = vsa.attention(q, k, v, 5, grid=GRID, precision="int8", return_selection=True)
    truth, *_ = dense.attention(q, k, v, 5, grid=GRID.shape, tile=GRID.tile, mask=selection.mask())
    assert error(out, truth.double()) <= ALLOWED["int8"]


@precisions
@pytest.mark.parametrize("backend", ["hopper", "flex"])
def test_backends_without_it_say_so(backend, precision) -> None:
    q, k, v = draw(1, 4, 4, 8, 2, 64)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run here"):
        vsa.attention(q, k, v, 1, precision=precision, backend=backend)
