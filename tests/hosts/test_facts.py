# SPDX-License-Identifier: Apache-2.0
"""facts.json: our code and the stand-ins agree with it, and the comparison with wheels can fail."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hosts import compare_with_wheels, stand_ins, wheels

import vsa
from vsa.integrations import sglang
from vsa.integrations.fastvideo import setup
from vsa.integrations.hosts import found, lists, packed
from vsa.integrations.vllm_omni import plugins

TREE = Path(__file__).resolve().parents[2]
FACTS = [(host["distribution"], fact) for host in wheels.facts() for fact in host["facts"]]


def fact(what: str, module: str, name: str) -> Any:
    (value,) = (
        each["is"]
        for _, each in FACTS
        if (each["what"], each["module"], each["name"]) == (what, module, name)
    )
    return value


def call(module: str, inside: str, name: str) -> dict[str, Any]:
    (value,) = (
        each["is"]
        for _, each in FACTS
        if (each["module"], each.get("in"), each["name"]) == (module, inside, name)
    )
    return value


def takes(function: Any, form: dict[str, Any], bound: bool = False) -> None:
    """Whether a function may be called in that form."""
    keywords = {name: None for name in form["keywords"] if name != "**"}
    inspect.signature(function).bind(*[None] * (form["positional"] + bound), **keywords)


def names(parameters: list[str]) -> list[str]:
    return [each.split("=")[0].lstrip("*") for each in parameters]


def test_versions_are_those_that_info_names() -> None:
    pinned = {host["distribution"]: host["version"] for host in wheels.facts()}
    for host in found.HOSTS:
        assert pinned.get(host.distribution, host.read) == host.read


def test_what_is_hooked_is_in_the_facts() -> None:
    known = {f"{each['module']}.{each['name']}" for _, each in FACTS}
    assert {sglang.LAYER, sglang.H3_KERNEL, sglang.H3_BUILD, sglang.H3_LAYER} <= known
    assert fact("parameters", setup.LAYER, "VideoSparseAttentionBackend.get_impl_cls") == []
    for name in setup.H3_KERNELS:
        assert call(setup.H3_LAYER, "MiniMaxH3VSAImpl.forward", name)["positional"] == 5
    for module, functions in lists.PROVIDED.items():
        for name, ours in functions.items():
            if module == "fastvideo_kernel":  # which has them from its modules
                continue
            theirs = names(fact("parameters", module, name))
            assert names(list(inspect.signature(ours).parameters))[: len(theirs)] == theirs


def test_calls_of_the_hosts_fit_our_functions() -> None:
    layer = "VideoSparseAttentionImpl.forward"
    takes(vsa.video_sparse_attn, call(setup.LAYER, layer, "video_sparse_attn"))
    takes(lists.whole_bshd, call(setup.LAYER, layer, "video_sparse_attn_bshd"))
    takes(vsa.video_sparse_attn, call(stand_ins.SGLANG_VSA, layer, "video_sparse_attn"))
    h3 = stand_ins.SGLANG_H3.replace("vsa_h3_kernels", "video_sparse_attn_h3")
    form = call(h3, "VideoSparseAttentionH3Impl.forward_varlen", sglang.H3_KERNEL.rsplit(".")[-1])
    takes(lists.from_lists, form)
    for _, each in FACTS:
        if each["what"] == "call" and each["name"] == "block_sparse_attn":
            takes(vsa.block_sparse_attn, each["is"])


def test_entry_points_stand_in_the_groups_of_the_hosts() -> None:
    text = (TREE / "pyproject.toml").read_text()
    sections = re.findall(r'^\[project\.entry-points\."(.+)"\]\n((?:\w.+\n)+)', text, re.MULTILINE)
    groups = {group: dict(re.findall(r'(\w+) = "(.+)"', lines)) for group, lines in sections}
    assert set(groups) == {host.group for host in found.HOSTS if host.group}
    sglang_plugins = "sglang.multimodal_gen.runtime.platforms.plugins"
    assert f"'{found.HOSTS[1].group}'" == fact("value", sglang_plugins, "GENERAL_PLUGINS_GROUP")
    group = fact("value", "vllm_omni.plugins", "OMNI_DEFAULT_PLUGINS_GROUP")
    assert group == f"'{found.HOSTS[2].group}'"
    for group in groups.values():
        assert {found.PLUGIN, sglang.LISTS} <= set(group) and sglang.LISTS == plugins.LISTS
        for path in group.values():
            module, function = path.split(":")
            __import__(module)
            assert callable(getattr(sys.modules[module], function))


@pytest.mark.parametrize("module", [stand_ins.FASTVIDEO, stand_ins.SGLANG_VSA])
def test_stand_ins_look_like_the_hosts(module: str) -> None:
    classes = stand_ins.wan_like()
    assert fact("value", module, "VSA_TILE_SIZE") == str(classes["VSA_TILE_SIZE"])
    for method in ("__init__", "preprocess_qkv", "forward", "postprocess_output"):
        name = f"VideoSparseAttentionImpl.{method}"
        own = getattr(classes["VideoSparseAttentionImpl"], method)
        assert list(inspect.signature(own).parameters) == names(fact("parameters", module, name))
    meta = vars(stand_ins.metadata((4, 4, 4), 0.5))
    assert {"dit_seq_shape", "variable_block_sizes"} <= set(meta)
    base = stand_ins.SGLANG + ".layers.attention.layer"
    form = call(base, "UlyssesAttention_VSA.forward", "self.attn_impl.forward")
    assert form == {"positional": 3, "keywords": ["attn_metadata", "gate_compress"]}


def test_the_stand_in_of_minimax_h3_looks_like_the_host() -> None:
    classes = stand_ins.h3_like()
    for owner, method in (
        ("MiniMaxH3VSAImpl", "__init__"),
        ("MiniMaxH3VSAImpl", "preprocess_qkv"),
        ("MiniMaxH3VSAImpl", "forward"),
        ("MiniMaxH3VSAMetadataBuilder", "build"),
    ):
        own = inspect.signature(getattr(classes[owner], method)).parameters
        theirs = fact("parameters", stand_ins.FASTVIDEO_H3, f"{owner}.{method}")
        assert list(own) == names(theirs), (owner, method)
    h3 = stand_ins.SGLANG_H3.replace("vsa_h3_kernels", "video_sparse_attn_h3")
    forward = names(fact("parameters", h3, "VideoSparseAttentionH3Impl.forward_varlen"))
    ours = list(inspect.signature(packed.sglang_forward).parameters)
    assert ours == ["theirs", "layer", *[name for name in forward[1:] if name]]
    known = names(fact("parameters", h3, "VideoSparseAttentionH3MetadataBuilder.build"))
    read = "prefix_segments packed_segments raw_latent_shape patch_size exempt tile_size"
    assert {*read.split(), "ref_keep_rate"} <= set(known)
    assert fact("parameters", h3, "VideoSparseAttentionH3Metadata.uses_regions") == ["self"]


def test_the_omni_stand_in_looks_like_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    abstract = f"{stand_ins.OMNI}.abstract"
    fields = set(fact("fields", abstract, "AttentionMetadata"))
    assert fields == set(vars(stand_ins.AttentionMetadata()))
    theirs = names(
        fact("parameters", f"{stand_ins.OMNI}.fastvideo_vsa", "FastVideoVSAImpl.__init__")
    )
    backend = stand_ins.omni(monkeypatch)
    own = inspect.signature(backend.VsaImpl.__init__).parameters
    assert [name for name in theirs if name not in own] == ["extra_impl_args"]
    made = call("vllm_omni.diffusion.attention.layer", "Attention.__init__", "self.attn_impl_cls")
    takes(backend.VsaImpl.__init__, made, bound=True)


MODULE = """
from vsa import video_sparse_attn
SIZE = (4, 4, 4)
class Kind:
    AROUND = "around"
class Base:
    shape: list
    def forward(self, q, *, k=None, **rest):
        return video_sparse_attn(q, k, sizes=1)
"""
KNOWN = [
    ("import", "vsa.video_sparse_attn", True, "from vsa", "from other"),
    ("value", "SIZE", "(4, 4, 4)", "(4, 4, 4)", "(4, 8, 8)"),
    ("value", "Kind.AROUND", "'around'", '"around"', '"round"'),
    ("fields", "Base", ["shape"], "shape: list", "form: list"),
    ("bases", "Base", [], "class Base:", "class Base(Kind):"),
    ("parameters", "Base.forward", ["self", "q", "*", "k=None", "**rest"], "q, *, k", "q, j, *, k"),
    ("call", "video_sparse_attn", {"positional": 2, "keywords": ["sizes"]}, "sizes=1", "size=1"),
]


@pytest.mark.parametrize(("what", "name", "value", "old", "new"), KNOWN)
def test_what_moves_in_a_host_is_a_sentence(
    what: str, name: str, value: Any, old: str, new: str
) -> None:
    known = {"module": "made.up", "what": what, "name": name, "is": value}
    if what == "call":
        known["in"] = "Base.forward"
    host = {"distribution": "made-up", "facts": [known]}

    def moved(text: str | None) -> list[str]:
        return list(compare_with_wheels.moved(host, lambda module: text))

    assert moved(MODULE) == []
    (sentence,) = moved(MODULE.replace(old, new))
    assert sentence.startswith("made-up: made.up") and name in sentence
    (sentence,) = moved("")
    assert f"has no {what} {name}" in sentence
    assert moved(None) == ["made-up: made.up is gone"]
