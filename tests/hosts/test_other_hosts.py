# SPDX-License-Identifier: Apache-2.0
"""xDiT, LightX2V and ComfyUI by their own call forms; lists of padded tiles; hosts in vsa info."""

from __future__ import annotations

import enum
import importlib.metadata
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import child_process
import pytest
import torch
from hosts import reference, stand_ins
from hosts.wan_layers import error, tensors
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

import vsa
from vsa.cli import app
from vsa.integrations import comfyui, lightx2v, xdit
from vsa.integrations.hosts import found, lists

GRID = (5, 7, 9)
TILES = reference.video_tiles(GRID, (4, 4, 4))
LIMIT = 1e-12


class Key(enum.Enum):
    """Backends of xDiT."""

    SDPA = "sdpa"
    FLASH = "flash"


@pytest.fixture
def xfuser(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    table = {Key.SDPA: lambda *arguments: ("dense", arguments)}
    ranks = SimpleNamespace(ring=1)

    def register_attention_function(backend_type: Key) -> Any:
        def keep(function: Any) -> Any:
            table[backend_type] = function
            return function

        return keep

    module = stand_ins.put(
        monkeypatch,
        "xfuser.core.distributed.attention_backend",
        ATTENTION_FUNCTION_REGISTRY=table,
        register_attention_function=register_attention_function,
    )
    stand_ins.put(
        monkeypatch,
        "xfuser.core.distributed",
        attention_backend=module,
        get_ring_parallel_world_size=lambda: ranks.ring,
    )
    return SimpleNamespace(table=table, ranks=ranks)


def test_a_key_of_xdit_is_sparse_where_the_grid_is_known(xfuser: SimpleNamespace) -> None:
    before = xfuser.table[Key.SDPA]
    theirs = xdit.install(Key.SDPA, 3)
    assert theirs is before
    q, k, v = tensors(math.prod(GRID), 3)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    call = dict(dropout_p=0.0, is_causal=False)
    ours = xfuser.table[Key.SDPA]
    out, lse = ours(*swapped, **call, attention_kwargs={"thw": GRID})
    assert lse is None
    assert error(out.transpose(1, 2), reference.attention(q, k, v, TILES, 3, None)) < LIMIT
    for kwargs in (None, {}, {"thw": None}):
        assert ours(*swapped, **call, attention_kwargs=kwargs)[0] == "dense"
    grid = {"thw": GRID}
    with pytest.raises(ValueError, match="is_causal and dropout_p must be off"):
        ours(*swapped, dropout_p=0.0, is_causal=True, attention_kwargs=grid)
    with pytest.raises(ValueError, match="query must hold the 315 tokens of thw"):
        ours(*(x[:, :, :-1] for x in swapped), **call, attention_kwargs=grid)
    xfuser.ranks.ring = 2
    with pytest.raises(ValueError, match="ring_degree must be 1 with vsa"):
        ours(*swapped, **call, attention_kwargs=grid)
    with pytest.raises(ValueError, match=r"backend must be one of SDPA, but it is <Key.FLASH"):
        xdit.install(Key.FLASH, 3)


def test_the_operator_of_lightx2v_takes_blocks_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    class Register(dict):
        def register(self, target: Any, key: str | None = None) -> None:
            assert key not in self
            self[key] = target

    table = Register()
    stand_ins.put(monkeypatch, "lightx2v.utils.registry_factory", SPARSE_OPERATOR_REGISTER=table)
    lightx2v.register()
    lightx2v.register()
    operator = table["vsa_operator"]()
    assert operator.q_block_size == operator.k_block_size == 64
    q, k, v = (x[0] for x in tensors(150, 3))
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).expand(1, 2, 3, 3)
    one = torch.tensor([0, 150])
    settings = dict(cu_seqlens_q=one, cu_seqlens_kv=one, max_seqlen_q=150, max_seqlen_kv=150)
    out = operator(q, k, v, mask, **settings, block_idx=3)
    allowed = mask.bool().repeat_interleave(64, -1).repeat_interleave(64, -2)[..., :150, :150]
    swapped = [x.transpose(0, 1)[None] for x in (q, k, v)]
    right = functional.scaled_dot_product_attention(*swapped, attn_mask=allowed)
    assert error(out, right[0].transpose(0, 1).flatten(1)) < LIMIT
    assert torch.equal(out, operator(q, k, v, mask[0], **settings))
    two = torch.tensor([0, 75, 150])
    with pytest.raises(ValueError, match="cu_seqlens_q must name one sequence, but names 2"):
        operator(q, k, v, mask, **(settings | {"cu_seqlens_q": two}))
    with pytest.raises(ValueError, match="max_seqlen_kv must be 150, the tokens that are given"):
        operator(q, k, v, mask, **(settings | {"max_seqlen_kv": 140}))
    only_ends = {"cu_seqlens_q": one, "cu_seqlens_kv": torch.tensor([0, 140])}
    with pytest.raises(ValueError, match="cu_seqlens_kv must be 150, the tokens that are given"):
        operator(q, k, v, mask, **only_ends)
    only_ends["cu_seqlens_kv"] = one
    assert torch.equal(out, operator(q, k, v, mask, **only_ends))
    for wrong, said in ((mask[0, 0], r"\(3, 3\)"), ([1], "list")):
        with pytest.raises(ValueError, match=rf"^mask must be a tensor .* but it is {said}"):
            operator(q, k, v, wrong, **settings)
    with pytest.raises(
        ValueError, match=r"^selection must be for .* \(1, 2, 3, 3\), but it is for"
    ):
        operator(q, k, v, mask[..., :2, :2], **settings)
    with pytest.raises(ValueError, match="causal must be False"):
        operator(q, k, v, mask, **settings, causal=True)
    scaled = operator(q, k, v, mask, **settings, softmax_scale=0.1)
    assert error(scaled, operator(q * 0.1 * q.shape[-1] ** 0.5, k, v, mask)) < LIMIT
    with pytest.raises(ValueError, match="operator_setting must be empty"):
        table["vsa_operator"]({"per_block_mean": True})


def dense(q: Tensor, *rest: Any, **keywords: Any) -> str:
    return "dense"


def test_the_override_of_comfyui_is_sparse_on_video(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(math.prod(GRID), 3)
    right = reference.attention(q, k, v, TILES, 3, None)
    ours = comfyui.override(3, dense_blocks=[1])
    options = {"grid_sizes": torch.Size(GRID), "block_index": 0}
    flat = [x.flatten(2) for x in (q, k, v)]
    more = dict(transformer_options=options, _inside_attn_wrapper=True)
    assert error(ours(dense, *flat, 2, **more), right.flatten(2)) < LIMIT
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    out = ours(dense, *swapped, 2, skip_reshape=True, skip_output_reshape=True, **more)
    assert error(out, right.transpose(1, 2)) < LIMIT
    assert (
        error(ours(dense, *swapped, heads=2, skip_reshape=True, **more), right.flatten(2)) < LIMIT
    )

    assert ours(dense, flat[0], flat[1][:, :7], flat[2][:, :7], 2, **more) == "dense"
    assert ours(dense, *flat, 2) == "dense"
    assert ours(dense, *flat, 2, transformer_options=options | {"block_index": 1}) == "dense"
    before = comfyui.override(3, previous=lambda func, *a, **b: ("before", func(*a, **b)))
    assert before(dense, *flat, 2) == ("before", "dense")
    with pytest.raises(ValueError, match="mask must be None in sparse self-attention"):
        ours(dense, *flat, 2, mask=torch.ones(1), **more)
    with pytest.raises(ValueError, match="the sequence must hold the 315 tokens of grid_sizes"):
        ours(dense, *(x[:, 1:] for x in flat), 2, **more)
    with pytest.raises(ValueError, match=r"^q must be \(B, S, heads \* head_dim\) with 3 heads"):
        ours(dense, *flat, 3, **more)
    with pytest.raises(TypeError, match="k must share the dtype of q"):
        ours(dense, flat[0], flat[1].float(), flat[2], 2, **more)
    text = tensors(512, 3)  # as many as ComfyUI gives Wan, so that its cross-attention looks alike
    small = {"grid_sizes": (2, 16, 16), "block_index": 0}
    with pytest.raises(ValueError, match="a video of 512 tokens cannot be told from Wan's text"):
        ours(dense, *(x.flatten(2) for x in text), 2, transformer_options=small)


def test_lists_and_maps_in_the_forms_of_the_hosts() -> None:
    """One tile without a token, as hosts add to make pairs; its row keeps nothing."""
    sizes = torch.tensor([64, 30, 0], dtype=torch.int32)
    q, k, v = (x.transpose(1, 2) for x in tensors(192, 3))
    kept = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool().expand(2, 2, 3, 3)
    right, _ = vsa.block_sparse_attn(q, k, v, kept, sizes)
    index = torch.tensor([[0, 1, 9], [1, 9, 9], [9, 9, 9]], dtype=torch.int32).expand(2, 2, 3, 3)
    counts = kept.sum(-1, dtype=torch.int32)
    out = torch.empty_like(q)
    given = lists.from_lists(q, k, v, index, counts, sizes, out=out, use_sm100_kernel=False)
    assert given is out and torch.equal(out, right) and out[:, :, 128:].abs().sum() == 0
    assert torch.equal(lists.from_lists(q, k, v, index, counts, sizes), right)
    for wrong in (out.new_empty(3, *out.shape), out.float()):
        with pytest.raises(
            ValueError, match=r"^out must be like q, \(2, 2, 192, 16\) torch.float64"
        ):
            lists.from_lists(q, k, v, index, counts, sizes, out=wrong)
    flat = [x.transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(lists.from_map_256_bshd(*flat, kept[0], sizes)[0].transpose(1, 2), right)
    whole = lists.whole_bshd(*flat, sizes, sizes, 2, (4, 4, 4), flat[0]).transpose(1, 2)
    assert torch.equal(whole, vsa.video_sparse_attn(q, k, v, sizes, sizes, 2, 64, q))


def versions(monkeypatch: pytest.MonkeyPatch, plugins: bool = True, **known: str) -> None:
    def version(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(found, "version", version)
    names = [SimpleNamespace(name="vsa")] if plugins else []
    monkeypatch.setattr(found, "entry_points", lambda group: names)


def test_info_names_hosts_and_how_they_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"})
    versions(monkeypatch)
    assert "none of fastvideo, sglang, vllm-omni, xfuser" in runner.invoke(app, ["info"]).output
    versions(monkeypatch, fastvideo="0.2.1", sglang="0.6.0")
    said = runner.invoke(app, ["info"]).output
    assert "fastvideo 0.2.1 takes it by vsa.integrations.fastvideo.install()" in said
    by_itself = "sglang 0.6.0 takes it by itself, with --attention-backend video_sparse_attn"
    assert f"{by_itself}; tried was 0.5.23, not this one" in said
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert "SGLANG_PLUGINS='other' leaves out the plugin vsa" in runner.invoke(app, ["info"]).output
    monkeypatch.setenv("SGLANG_PLUGINS", "")  # to SGLang this is as if it were not set
    assert by_itself in runner.invoke(app, ["info"]).output
    versions(monkeypatch, plugins=False, **{"vllm-omni": "0.30.0"})
    (row,) = found.hosts_found()
    assert row[0] == "vllm-omni 0.30.0" and "installed without its entry points" in row[1]


@pytest.mark.parametrize(
    ("allowed", "loads"), [("vsa", True), ("a,vsa", True), ("a, vsa", False), ("", False)]
)
def test_info_reads_the_setting_of_vllm_as_vllm_does(
    monkeypatch: pytest.MonkeyPatch, allowed: str, loads: bool
) -> None:
    """An empty one names nothing there, and a space is part of a name."""
    versions(monkeypatch, **{"vllm-omni": "0.30.0"})
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    ((_, how),) = found.hosts_found()
    assert how.startswith("takes it by itself") == loads
    assert (f"VLLM_PLUGINS={allowed!r} leaves out the plugin vsa" in how) != loads


def test_info_says_what_becomes_of_plugins_on_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.gpu(monkeypatch, "it is another GPU")
    versions(monkeypatch, fastvideo="0.2.1", sglang="0.5.23", **{"vllm-omni": "0.30.0"})
    said = dict(found.hosts_found())
    assert said["fastvideo 0.2.1"].startswith("takes it by vsa.integrations.fastvideo.install()")
    why = ": backend 'hopper' cannot run here, it is another GPU"
    for name, kept in (
        ("sglang 0.5.23", "keeps its own kernel for video_sparse_attn_h3"),
        ("vllm-omni 0.30.0", "keeps its own class for FASTVIDEO_VSA if fastvideo_kernel is"),
    ):
        assert said[name].startswith(kept) and said[name].endswith(why)


@pytest.mark.parametrize("plugin", ["sglang", "vllm_omni", "fastvideo"])
def test_plugins_say_that_another_package_has_the_name(plugin: str, tmp_path: Path) -> None:
    """Hosts log what a plugin raises and go on; without this it would fail at the first layer."""
    (tmp_path / "vsa").mkdir()
    ours = Path(vsa.__file__).parent
    (tmp_path / "vsa" / "__init__.py").write_text(f"__path__.append({str(ours)!r})\n")
    paths = [str(tmp_path), str(ours.parent)]
    code = f"import sys; sys.path[:0] = {paths}; import vsa.integrations.{plugin}"
    done = child_process.run([sys.executable, "-c", code], cwd=tmp_path)
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError:") and "whose import name is vsa" in said, said
