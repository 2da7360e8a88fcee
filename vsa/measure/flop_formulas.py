# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's ``FlopCounterMode`` counts for the operators ``torch.ops.vsa.*``.

As PyTorch's own formulas do, these count products alone, a multiply-add as two: tile means, the
choice itself, softmax and gates are nothing. Where PyTorch computes the coarse attention, its own
formula counts that, if it has one for the kernel (on CPUs it has none); our kernels take the scores
of the choice and of the coarse attention from one product. The rest is that of ``vsa.flops``,
ragged tiles with the mean size of a key tile.

How many tiles are kept stands in the bitmap, which is read, on a GPU by waiting for it. Where it
holds no numbers yet (fake tensors) or must not be waited for (while a CUDA graph is captured), the
operator's own bound counts: exact for a number or a share of the tiles, the largest of one per
head, all tiles for a ``vsa.TopP``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vsa.cost import BACKWARD
from vsa.values import bitmap
from vsa.values.grid import SLOTS, Grid

COUNTER = "torch.utils.flop_counter"
Named = dict[str, Any]
"""Arguments of an operator by the names of its schema, and its results."""
RESULTS = "results"
"""The name of the results."""


def _select(call: Named) -> float:
    return 2.0 * _pairs_of_tiles(call["q_means"], call["k_means"])


def _select_by_sub_blocks(call: Named) -> float:
    return _whole_scores(call, call["runs"] ** 2)


def _coarse(call: Named) -> float:
    return 4.0 * _pairs_of_tiles(call["q_means"], call["k_means"])


def _padded_fine(call: Named) -> float:
    tokens, kv_tokens = (_sum_of(call[x], SLOTS) for x in ("sizes", "kv_sizes"))
    batch, _, heads, head_dim = call["q"].shape
    tiles = len(call["kv_sizes"])
    kept = _kept(call["bitmap"], call.get("most", tiles)) / tiles * kv_tokens
    return 4.0 * batch * heads * head_dim * tokens * kept


def _padded_backward(call: Named) -> float:
    return BACKWARD * _padded_fine(call)


def _padded_gated_backward(call: Named) -> float:
    return BACKWARD * (_padded_fine(call) + _coarse(call))


def _fine(call: Named) -> float:
    grid, kv_grid = (Grid.from_ints([int(x) for x in call[x]]) for x in ("grid", "kv_grid"))
    batch, _, heads, head_dim = call["q"].shape
    tiles = _kept(call["bitmap"], call.get("most", kv_grid.num_tiles))
    kept = tiles / kv_grid.num_tiles * kv_grid.tokens
    left_out = 0 if call.get("tail_keys") is None else kv_grid.num_tiles - tiles
    pairs = grid.tokens * (kept + left_out + kv_grid.text) + grid.text * kv_grid.length
    return 4.0 * batch * heads * head_dim * pairs


def _fine_backward(call: Named) -> float:
    return BACKWARD * _fine(call)


def _gated_backward(call: Named) -> float:
    coarse = 0.0 if call["q_means"] is None else _coarse(call)
    return BACKWARD * (_fine(call) + coarse)


def _whole_scores(call: Named, products: float) -> float:
    grid, kv_grid = (Grid.from_ints([int(x) for x in call[x]]) for x in ("grid", "kv_grid"))
    batch, _, heads, head_dim = call["q"].shape
    return 2.0 * products * batch * heads * grid.num_tiles * kv_grid.num_tiles * head_dim


def _whole(call: Named) -> float:
    call = call | {"bitmap": call[RESULTS][2]}
    products = 2 * (call["gate_coarse"] is not None)
    if call["runs"] > 1:
        products += call["runs"] ** 2
    return _whole_scores(call, max(1, products)) + _fine(call)


def _whole_backward(call: Named) -> float:
    coarse = 0.0 if call["gate_coarse"] is None else _whole_scores(call, 2)
    return BACKWARD * (coarse + _fine(call))


FORMULAS: dict[str, Callable[[Named], float]] = {
    "select_tiles": _select,
    "select_and_attend": _coarse,
    "select_by_sub_blocks": _select_by_sub_blocks,
    "coarse_attention": _coarse,
    "block_sparse_attention": _fine,
    "low_precision_attention": _fine,
    "gated_low_precision_attention": _fine,
    "block_sparse_attention_backward": _fine_backward,
    "tail_attention": _fine,
    "tail_attention_backward": _fine_backward,
    "gated_attention": _fine,
    "gated_attention_inference": _fine,
    "gated_attention_backward": _gated_backward,
    "gated_tail_attention": _fine,
    "gated_tail_attention_inference": _fine,
    "gated_tail_attention_backward": _gated_backward,
    "padded_attention": _padded_fine,
    "padded_attention_backward": _padded_backward,
    "padded_gated_attention": _padded_fine,
    "padded_gated_attention_inference": _padded_fine,
    "padded_gated_attention_backward": _padded_gated_backward,
    "attention": _whole,
    "attention_inference": _whole,
    "attention_backward": _whole_backward,
}
"""By the name of the operator."""


def _pairs_of_tiles(q_means: Tensor, k_means: Tensor) -> int:
    batch, heads, rows, head_dim = q_means.shape
    return batch * heads * rows * k_means.shape[2] * head_dim


def _kept(chosen: Tensor, most: int) -> float:
    """Key tiles of a query tile: the mean of what the bitmap says, or the bound of it."""
    if isinstance(chosen, FakeTensor) or chosen.is_meta or chosen.numel() == 0:
        return most
    if chosen.is_cuda and torch.cuda.is_current_stream_capturing():
        return most
    return bitmap.count(chosen).double().mean().item()


def _sum_of(sizes: Tensor, most: int) -> float:
    """Real tokens of padded tiles, or all slots where the sizes are no numbers yet."""
    if isinstance(sizes, FakeTensor) or sizes.is_meta:
        return most * len(sizes)
    if sizes.is_cuda and torch.cuda.is_current_stream_capturing():
        return most * len(sizes)
    return sizes.sum().item()


def register(counter: ModuleType) -> None:
    """Give the formulas to PyTorch's counter, each once.

    Args:
        counter: the module ``torch.utils.flop_counter``.
    """
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.vsa, name)
        if operator not in counter.flop_registry:
            named = _by_name(operator.default, formula)
            counter.register_flop_formula(operator, get_raw=True)(named)


def _by_name(operator: Any, formula: Callable[[Named], float]) -> Callable[..., int]:
    """A formula as the counter calls it."""
    names = [argument.name for argument in operator._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        return round(formula(given | {RESULTS: out_val}))

    return count


class _Registrar(MetaPathFinder):
    """Registers when somebody imports the counter, which few do and which takes its time."""

    def __init__(self) -> None:
        self.looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.looking = False
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """Now, if the counter has been imported, else as soon as it is."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registrar())
