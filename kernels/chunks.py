"""A piece cut into blocks of equal length, and what the blocks of packed documents may pass to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def to_chunks(x: Tensor, block_len: int, value: float = 0) -> Tensor:
    """``[B, L, ...]`` -> ``[B, N, block_len, ...]``, ``N = ceil(L / block_len)``, the last block filled up with
    ``value``.

    A view where ``block_len`` divides L.
    """
    missing = -x.shape[1] % block_len
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=value)
    return x.unflatten(1, (x.shape[1] // block_len, block_len))


def from_chunks(x: Tensor, length: int) -> Tensor:
    """``[B, N, block_len, ...]`` -> the first ``length`` tokens, ``[B, length, ...]``."""
    return x.flatten(1, 2)[:, :length]


@dataclass(frozen=True)
class Documents:
    """Which tokens of a piece's blocks share a document. Built from ``segments [B, L]``, padded with the last id.

    Attributes:
        ids: ``[B, N, C]`` document ids by block.
        continues: ``[B, N]`` whether a block's first token continues the document of the token before it.
            Block 0 always does: whether it continues the piece's past, the relay has decided already.
        whole: ``[B, N]`` whether a block is of one document (what enters may leave).
        head: ``[B, N, C]`` tokens in the document that the block begins with (a state from the left reaches them).
        tail: ``[B, N, C]`` tokens in the document that the block ends with (they make up the state that leaves).
    """

    ids: Tensor
    continues: Tensor
    whole: Tensor
    head: Tensor
    tail: Tensor

    @classmethod
    def of(cls, segments: Tensor, block_len: int) -> Documents:
        last = segments[:, -1:].expand(-1, -segments.shape[1] % block_len)
        ids = torch.cat([segments, last], dim=1).unflatten(1, (-1, block_len))
        first_ids, last_ids = ids[:, :, 0], ids[:, :, -1]
        continues = torch.ones_like(first_ids, dtype=torch.bool)
        continues[:, 1:] = first_ids[:, 1:] == last_ids[:, :-1]
        return cls(
            ids=ids,
            continues=continues,
            whole=first_ids == last_ids,
            head=ids == first_ids.unsqueeze(-1),
            tail=ids == last_ids.unsqueeze(-1),
        )

    def together(self) -> Tensor:
        """``[B, N, C, C]``: whether tokens i and j of a block share a document."""
        return self.ids.unsqueeze(-1) == self.ids.unsqueeze(-2)
