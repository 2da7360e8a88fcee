# SPDX-License-Identifier: Apache-2.0
"""What ``install`` changes in FastVideo, which has no place where others may register."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vsa.integrations.fastvideo.kernel import stand_in
from vsa.integrations.hosts import packed
from vsa.integrations.hosts.implementation import in_raster_order
from vsa.integrations.hosts.lists import PROVIDED
from vsa.integrations.hosts.patches import Patches

HOST = "FastVideo"
LAYER = "fastvideo.attention.backends.video_sparse_attn"
H3_LAYER = "fastvideo.attention.backends.video_sparse_attn_h3"
WORKERS = "fastvideo.worker.multiproc_executor"
H3_KERNELS = {
    "block_sparse_attn_64_bhsd": PROVIDED["fastvideo_kernel.block_sparse_attn"][
        "block_sparse_attn"
    ],
    "block_sparse_attn_256_bshd": PROVIDED["fastvideo_kernel.block_sparse_attn_256"][
        "block_sparse_attn_256_bshd"
    ],
}
"""Kernels by the names under which FastVideo's MiniMax-H3 layer keeps them."""

_patches = Patches(HOST)
_done: set[str] = set()


def install(*, lists: bool = False) -> None:
    """Let FastVideo's VSA layers that are made from now on run on ``vsa.attention``.

    These are VIDEO_SPARSE_ATTN (Wan, LTX-2) and VIDEO_SPARSE_ATTN_H3 (MiniMax-H3). Call it before
    FastVideo makes a model. Its worker processes, which are new ones and know nothing of what was
    changed here, are installed as they start. A second call changes nothing but ``lists``. Where
    ``fastvideo_kernel`` cannot be imported, a module with our drop-ins takes its name.

    Args:
        lists: also replace the functions of ``fastvideo_kernel`` over padded tiles, for whoever
            calls them besides.

    Raises:
        ImportError: FastVideo is not installed, or does not have what is replaced; nothing is
            changed then.
    """
    if not isinstance(lists, bool):
        raise TypeError(f"lists must be True or False, but it is {lists!r}")
    if find_spec("fastvideo") is None:
        raise ImportError("fastvideo is not installed: run pip install fastvideo==0.2.1")
    with _patches.lock:
        try:
            if "layer" not in _done:
                _install_layer()
            if lists and "lists" not in _done:
                _install_lists()
        except BaseException:
            uninstall()
            raise


def uninstall() -> None:
    """FastVideo as it was before ``install``; layers that were made in between keep what they have.

    Raises:
        RuntimeError: someone else has replaced the same since; nothing is changed then.
    """
    _patches.undo()
    _done.clear()


def worker_main(lists: bool, *args: Any, **keywords: Any) -> Any:
    """The main function of a worker process: installed, and then FastVideo's own."""
    install(lists=lists)
    theirs = _patches.old(import_module(WORKERS).WorkerMultiprocProc, "worker_main")
    return theirs.__func__(*args, **keywords)


def _install_layer() -> None:
    stand_in(_patches)
    backend = import_module(LAYER).VideoSparseAttentionBackend
    theirs = backend.get_impl_cls

    def get_impl_cls() -> type:
        return in_raster_order(theirs(), HOST)

    _patches.put(backend, "get_impl_cls", staticmethod(get_impl_cls))
    if find_spec(H3_LAYER) is not None:
        _install_h3()
    _put_worker_main(lists=False)
    _done.add("layer")


def _install_h3() -> None:
    layer = import_module(H3_LAYER)
    backend, builder = layer.MiniMaxH3VSABackend, layer.MiniMaxH3VSAMetadataBuilder
    theirs, build = backend.get_impl_cls, builder.build

    def get_impl_cls() -> type:
        return packed.fastvideo_class(theirs())

    @functools.wraps(build)
    def noted(*args: Any, **keywords: Any) -> Any:
        return packed.build(build, *args, **keywords)

    _patches.put(backend, "get_impl_cls", staticmethod(get_impl_cls))
    _patches.put(builder, "build", noted)


def _install_lists() -> None:
    # All first: an import of fastvideo_kernel.block_sparse_attn sets that name of the package,
    # which is a function's.
    modules = {name: import_module(name) for name in PROVIDED}
    layer = import_module(H3_LAYER)
    for name, functions in PROVIDED.items():
        for function, ours in functions.items():
            _patches.put(modules[name], function, ours)
    for name, ours in H3_KERNELS.items():
        if not hasattr(layer, name):
            raise ImportError(f"{H3_LAYER} has no {name}: this FastVideo is another than 0.2.1")
        _patches.put(layer, name, ours)
    _put_worker_main(lists=True)
    _done.add("lists")


def _put_worker_main(lists: bool) -> None:
    """A process takes this function along by its name and module, and so imports ``vsa``."""
    started = functools.partial(worker_main, lists)
    _patches.put(import_module(WORKERS).WorkerMultiprocProc, "worker_main", staticmethod(started))
