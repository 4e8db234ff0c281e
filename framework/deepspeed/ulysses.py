"""DeepSpeed's Ulysses, which `launch.bench` measures beside longreach. Training does not use it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...parallel.mesh import Axis
from .workarounds import avoid_compiling


def init_deepspeed_world() -> None:
    """Give DeepSpeed its own interface to the gloo process group that was joined."""
    import deepspeed

    avoid_compiling()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def ulysses_attention(attend: Callable[..., Tensor], axis: Axis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the whole sequence: all-to-alls give each rank all tokens of some heads, and undo that after it.

    Args:
        attend: attention of q, k, v over all tokens of some heads.
        axis: the ranks that share the sequence; at most as many as heads.
        q, k, v: ``[B, n, H, K]``, the tokens of this rank's shard.

    Returns:
        ``[B, n, H, K]``.
    """
    from deepspeed.sequence.layer import DistributedAttention

    y: Tensor = DistributedAttention(attend, axis.group, scatter_idx=2, gather_idx=1)(q, k, v, 0)
    return y
