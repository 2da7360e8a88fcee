# SPDX-License-Identifier: Apache-2.0
# Written by csrc/bind/make_stub.py from the tables of csrc/bind: change those, not this.
from collections.abc import Sequence
from typing import Any, ClassVar, Final, TypeAlias, final

Address: TypeAlias = int
"""of contiguous elements; 0 where there are none"""

Dtype: TypeAlias = str
"""bfloat16, float16 or float32"""

GridSizes: TypeAlias = Sequence[int]
"""T, H, W, tile t, h, w, prefix, suffix, in tokens"""

Extent: TypeAlias = tuple[int, int, int]
"""along t, h and w"""

TokenView: TypeAlias = tuple[int, int, int, int]
"""address; strides of batch, token and head, in elements"""

SequenceView: TypeAlias = tuple[TokenView, TokenView, TokenView]
"""video, prefix, suffix"""

GateView: TypeAlias = tuple[int, int, int, int, int, int]
"""address (0: no gate), 1 for float32, strides of batch, token, head and channel in elements"""

MatrixView: TypeAlias = tuple[int, int, int, int]
"""address; strides of matrix, row and column, in elements"""

ALONG_T: Final[int]
ALONG_W: Final[int]
BACKWARDS: Final[int]
CHANNEL_RECORD_BYTES: Final[int]
DEPTH_AND_ROWS: Final[int]
ELEMENTS: Final[tuple[str, ...]]
HEAD_DIMS: Final[tuple[int, ...]]
KEY_TILES_PER_GROUP: Final[int]
MEAN_ELEMENTS: Final[tuple[str, ...]]
MOST_HEAD_BUDGETS: Final[int]
ROWS_AND_COLUMNS: Final[int]
ROWS_AND_DEPTH: Final[int]
RUN_SLOTS: Final[tuple[int, ...]]
TYPES: Final[dict[str, tuple[str, str]]]

def backward_query_tiles_per_group(head_dim: int) -> int: ...
def build_info() -> dict[str, Any]: ...
def device_count() -> tuple[int, str]: ...
def low_precision_work_tiles(head_dim: int, tiles: int) -> int: ...
def quantised_tile_bytes(head_dim: int) -> int: ...
def query_tiles_per_group(head_dim: int) -> int: ...

@final
class AxisChoice:
    """The axis along which tiles are taken together, ALONG_W or ALONG_T, and BACKWARDS."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        bitmap: Address,
        axes: Address,
        batch: int,
        heads: int,
        groups: int,
        words: int,
        tiles: Extent,
        counters: Address,
        count: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class BitmapTranspose:
    """Bitmaps with rows and columns exchanged, and how many bits each row then has."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        source: Address,
        target: Address,
        counts: Address,
        bitmaps: int,
        rows: int,
        columns: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class ChannelStatistics:
    """What eight bits of keys and values need to know of whole heads."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        k: TokenView,
        v: TokenView,
        grid: GridSizes,
        text_rows: Address,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: Dtype,
        records: Address,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class ChunkMeans:
    """Means of the tiles of a chunk, whose keys and values go into a cache."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        k: MeanTensor,
        v: MeanTensor,
        queries: Sequence[MeanTensor],
        k_slots: TokenView,
        v_slots: TokenView,
        k_text: TokenView,
        v_text: TokenView,
        slot: Address,
        slots: int,
        batch: int,
        head_dim: int,
        dtype: Dtype,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class CleanText:
    """Which rows of the text's tiles are real tokens, and copies of text with zeros elsewhere."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        valid: Address,
        valid_batch_stride: int,
        valid_token_stride: int,
        batch: int,
        prefix: int,
        suffix: int,
        head_dim: int,
        rows: Address,
        tensors: Sequence[TextTensor],
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class FineBackward:
    """One call of the backward kernels; its rows come first."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        problem: FineProblem,
        q: SequenceView,
        k: SequenceView,
        v: SequenceView,
        grad_fine: SequenceView,
        grad_q: SequenceView,
        grad_k: SequenceView,
        grad_v: SequenceView,
        fine_out: TokenView,
        grad_out: TokenView,
        grad_fine_tokens: TokenView,
        gates: Gates,
        grad_gate_fine: Address,
        grad_gate_coarse: Address,
        grad_coarse: Address,
        grad_q_means: Address,
        grad_k_means: Address,
        grad_v_means: Address,
        transposed_bitmap: Address,
        key_axes: Address,
        key_order: Address,
        long_keys: Address,
        query_order: Address,
        long_queries: Address,
        lse: Address,
        grad_lse: Address,
        tile_counters: Address,
        grad_q_sums: Address,
        row_stats: Address,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def emulate_rows(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def launch_rows(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...
    def step_rows(self) -> Step: ...

@final
class FineForward:
    """One call of the forward kernel."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        problem: FineProblem,
        q: SequenceView,
        k: SequenceView,
        v: SequenceView,
        out: SequenceView,
        fine: SequenceView,
        gates: Gates,
        lse: Address,
        tile_counter: Address,
        order: Address,
        long_ones: Address,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class FineProblem:
    """What both directions of the fine stage are told."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        grid: GridSizes,
        kv_grid: GridSizes,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: Dtype,
        scale: float,
        bitmap: Address,
        query_axes: Address,
        query_text_rows: Address,
        key_text_rows: Address,
        sizes: Address,
        kv_sizes: Address,
    ) -> None: ...

@final
class Gates:
    """The gates of a call; zeros for those that are not there."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        fine: GateView,
        coarse: GateView,
        coarse_rows: Address,
    ) -> None: ...

@final
class GroupSort:
    """The order of groups of neighbouring tiles, the longest row first."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        counts: Address,
        axes: Address,
        order: Address,
        long_ones: Address,
        batch: int,
        heads: int,
        head_groups: int,
        tiles: int,
        text_tiles: int,
        layers: int,
        together: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class HideEmpty:
    """Scores of key tiles without a token, which nobody may choose."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        scores: Address,
        kv_sizes: Address,
        rows: int,
        columns: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class KeptTiles:
    """What callers keep, as a bitmap of tiles of 64 slots."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        lists: Address,
        map: Address,
        words: Address,
        counts: Address,
        sizes: Address,
        kv_sizes: Address,
        bitmap: Address,
        lengths: Address,
        part_sizes: Address,
        rows: int,
        query_tiles: int,
        columns: int,
        width: int,
        parts: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class LowPrecisionForward:
    """The forward kernel over quantised tiles."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        forward: FineForward,
        fp8: bool,
        images: Address,
        channels: Address,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class MaskOfTiles:
    """A rule over tiles, or bitmaps of what rows may choose."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        rule: Sequence[int],
        allowed: Address,
        mask_heads: int,
    ) -> None: ...

@final
class MaskedProducts:
    """Products without what no row may choose."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        products: Products,
        rule: Sequence[int],
        first_query: int,
        sides: Sequence[int],
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class MaskedScoreGradient:
    """ScoreGradient without what no row may choose."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        gradient: ScoreGradient,
        rule: Sequence[int],
        first_query: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class MaskedSelectTiles:
    """SelectTiles among the tiles that each row may choose."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        select: SelectTiles,
        mask: MaskOfTiles,
        shares: Sequence[float],
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class MaskedSoftmaxRows:
    """SoftmaxRows over the tiles that each row may choose."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        softmax: SoftmaxRows,
        mask: MaskOfTiles,
        first_row: int,
        query_tiles: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class MaskedTileMeans:
    """Tile means; zeros for key tiles that no row may choose."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        means: TileMeans,
        rule: Sequence[int],
        first_of_keys: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class MeanTensor:
    """A tensor of tokens, and where the means of its tiles go."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        tokens: TokenView,
        grid: GridSizes,
        sizes: Address,
        heads: int,
        means: Address,
    ) -> None: ...

@final
class Product:
    """One of a launch: out = scale * left @ right.mT, or added to out."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        left: MatrixView,
        right: MatrixView,
        out: MatrixView,
        matrices: int,
        rows: int,
        columns: int,
        depth: int,
        scale: float,
        accumulate: bool,
    ) -> None: ...

@final
class Products:
    """Up to three products of fp32 matrices."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        products: Sequence[Product],
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class Program:
    """Prepared calls that run one after the other."""

    def __init__(self, steps: Sequence[Step]) -> None: ...
    def emulate(self, addresses: Sequence[int], blocks: int, seed: int) -> None: ...
    def launch(self, addresses: Sequence[int], device: int, stream: int) -> None: ...

@final
class QuantiseTiles:
    """Keys and values of some heads in eight bits, images of tiles."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        statistics: ChannelStatistics,
        fp8: bool,
        channels: Address,
        images: Address,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class ReorderBitmap:
    """Rows of a bitmap with chunks of columns in another order."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        source: Address,
        target: Address,
        order: Address,
        rows: int,
        columns: int,
        per_chunk: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class RoundMeans:
    """Makes TailKeys of the means of keys and values."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        k_means: Address,
        v_means: Address,
        to: TailKeys,
        kv_grid: GridSizes,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: Dtype,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class RunMeans:
    """Means of the tiles of up to three tensors, and of their runs."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        tensors: Sequence[RunTensor],
        batch: int,
        head_dim: int,
        runs: int,
        slots: int,
        dtype: Dtype,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class RunTensor:
    """A tensor of tokens, and where the means of its tiles and their runs go."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        tokens: TokenView,
        grid: GridSizes,
        heads: int,
        means: Address,
        rows: Address,
        factors: Address,
        are_keys: bool,
    ) -> None: ...

@final
class ScoreGradient:
    """out = weights * (grad_outputs @ values.mT - (grad_outputs * outputs).sum(-1, True))."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        grad_outputs: MatrixView,
        outputs: MatrixView,
        values: MatrixView,
        weights: MatrixView,
        out: MatrixView,
        matrices: int,
        rows: int,
        columns: int,
        depth: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class SelectTiles:
    """The tiles that rows of scores keep, and their softmax."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        scores: Address,
        must: Address,
        bitmap: Address,
        weights: Address,
        first_row: int,
        rows: int,
        columns: int,
        query_tiles: int,
        counts: Sequence[int],
        mass: float,
        oldest: Address,
        ring: int,
        per_slot: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class SoftmaxRows:
    """The softmax of rows of scores, in place."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        scores: Address,
        rows: int,
        columns: int,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class Step:
    """A prepared call, to be run in a Program."""

    ...

@final
class SubBlockScores:
    """Scores of tiles by the means of their runs."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        queries: Address,
        query_factors: Address,
        keys: Address,
        key_factors: Address,
        scores: Address,
        matrices: int,
        rows: int,
        columns: int,
        head_dim: int,
        slots: int,
        has_empty: bool,
        scale: float,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class TailBackward:
    """Gradients of the means; after the fine stage's, the rest of dq."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        fine: FineBackward,
        tail: TailKeys,
        parts: Address,
        splits: int,
        sum_k: Address,
        sum_v: Address,
        accumulate: bool,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def emulate_means(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def launch_means(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...
    def step_means(self) -> Step: ...

@final
class TailForward:
    """Output and log-sum-exp of the fine stage become those of the whole."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        fine: FineForward,
        tail: TailKeys,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...

@final
class TailKeys:
    """Means of the keys' tiles as the tail's kernels read them."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        k: Address,
        k_low: Address,
        v: Address,
        bias: Address,
    ) -> None: ...

@final
class TextTensor:
    """One of a launch: a tensor whose text is copied."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        tokens: TokenView,
        length: int,
        heads: int,
        clean: Address,
    ) -> None: ...

@final
class TileMeans:
    """Means of the tiles of up to three tensors."""

    FIELDS: ClassVar[dict[str, str]]
    def __init__(
        self,
        *,
        tensors: Sequence[MeanTensor],
        batch: int,
        head_dim: int,
        dtype: Dtype,
    ) -> None: ...
    def emulate(self, blocks: int, seed: int) -> None: ...
    def launch(self, device: int, stream: int) -> None: ...
    def step(self) -> Step: ...
