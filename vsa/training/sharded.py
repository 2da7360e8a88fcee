# SPDX-License-Identifier: Apache-2.0
"""The model on a mesh of ranks: clips over its rows, the sequence of each over its columns.

Weights are sharded over a row and kept by every row (FSDP2 on a mesh of two dimensions). A rank's
loss is the mean over its clips and its tokens. So as ranks have equally many of both, FSDP2's mean
of gradients over all ranks is the gradient of the mean over all clips and tokens.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from vsa.distributed import shard_sequence
from vsa.training.model import VideoTransformer


def shard(model: VideoTransformer, mesh: DeviceMesh) -> None:
    """Put a model on a mesh; then it is called with what ``part`` gives.

    Args:
        model: of a kind that chooses its tiles: vsa, fine, ramp or abrupt.
        mesh: of two dimensions, (clips, sequence).

    Raises:
        TypeError, ValueError: another kind, or ranks that do not divide heads or tokens.
    """
    if mesh.ndim != 2:
        raise ValueError(f"mesh must have two dimensions (clips, sequence), but it has {mesh.ndim}")
    columns = mesh.size(1)
    if model.grid.tokens % columns:
        raise ValueError(
            f"mesh has {columns} columns, which must divide the {model.grid.tokens} tokens of grid"
        )
    shard_sequence(model, mesh.get_group(1))
    for block in model.layers:
        position = block.position  # its tables are of no weights, and a rank needs its own part
        position.cosines, position.sines = (
            x.chunk(columns)[mesh.get_local_rank(1)].clone()
            for x in (position.cosines, position.sines)
        )
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def part(x: Tensor, mesh: DeviceMesh, has_tokens: bool = True) -> Tensor:
    """This rank's clips of a batch (B, ...), and its tokens of (B, S, numbers).

    Raises:
        ValueError: a batch that the rows of the mesh do not divide.
    """
    if x.shape[0] % mesh.size(0):
        raise ValueError(f"x has {x.shape[0]} clips, which {mesh.size(0)} rows of mesh must divide")
    x = x.chunk(mesh.size(0))[mesh.get_local_rank(0)]
    return x.chunk(mesh.size(1), dim=1)[mesh.get_local_rank(1)] if has_tokens else x
