# SPDX-License-Identifier: Apache-2.0
"""What ``enable_parallelism`` of diffusers has asked for, in terms of ``vsa.distributed``.

diffusers shards the sequence by hooks of its own, in contiguous pieces in the order of ranks, as
evenly as torch.tensor_split does; that is what ``ulysses_attention`` expects by default.
"""

from __future__ import annotations

from typing import Any

from vsa.integrations.diffusers.processors import SparseProcessor


def sharding_group(path: str, processor: SparseProcessor) -> Any:
    """The process group that holds the sequence in shards.

    Args:
        path: of the layer's block, for errors.
        processor: one on which diffusers has set a parallel configuration.

    Raises:
        NotImplementedError: a kind of parallelism in which sparse attention would not be exact, or
            that this family of transformers does not have.
    """
    parallel = processor._parallel_config.context_parallel_config
    if parallel.ring_degree > 1:
        raise NotImplementedError(
            f"enable_parallelism asks {path} for ring attention (ring_degree="
            f"{parallel.ring_degree}), which cannot be exact: the top-k is over all key tiles, and "
            "a ring step sees one shard of them; use ulysses_degree instead"
        )
    if not processor.plan_of_diffusers:
        raise NotImplementedError(
            f"enable_parallelism shards the sequence of {path}, which holds video and text "
            "together and for which diffusers has no plan: leave it out and call "
            "apply_vsa(transformer, topk=..., group=...) instead"
        )
    return parallel._ulysses_mesh.get_group()
