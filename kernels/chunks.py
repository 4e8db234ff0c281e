"""Cuts a shard into chunks of equal length, and finds which tokens of a chunk may exchange states between documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def to_chunks(x: Tensor, chunk_len: int, value: float = 0) -> Tensor:
    """``[B, L, ...]`` -> ``[B, N, chunk_len, ...]``, ``N = ceil(L / chunk_len)``, the last chunk padded with ``value``.

    A view where ``chunk_len`` divides L.
    """
    missing = -x.shape[1] % chunk_len
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=value)
    return x.unflatten(1, (x.shape[1] // chunk_len, chunk_len))


def from_chunks(x: Tensor, length: int) -> Tensor:
    """``[B, N, chunk_len, ...]`` -> the first ``length`` tokens, ``[B, length, ...]``."""
    return x.flatten(1, 2)[:, :length]


@dataclass(frozen=True)
class Documents:
    """Masks of the documents of a shard's chunks of C tokens, built from ``segments [B, L]`` padded with the last id.

    From left to right, the state before a chunk reaches the tokens of `head`; the tokens of `tail` contribute to the
    state after it, and the state before it passes through it where the chunk is `whole`. From right to left, `head` and
    `tail` change places.

    Attributes:
        ids: ``[B, N, C]`` int64, the document ids.
        continues: ``[B, N]`` bool, whether a chunk's first token is of the same document as the token before it. True
            for chunk 0: whether the shard continues the document before it is decided by `kernels.scan`.
        whole: ``[B, N]`` bool, whether all tokens of the chunk are of one document.
        head: ``[B, N, C]`` bool, tokens of the same document as the chunk's first token.
        tail: ``[B, N, C]`` bool, tokens of the same document as the chunk's last token.
    """

    ids: Tensor
    continues: Tensor
    whole: Tensor
    head: Tensor
    tail: Tensor

    @classmethod
    def of(cls, segments: Tensor, chunk_len: int) -> Documents:
        last = segments[:, -1:].expand(-1, -segments.shape[1] % chunk_len)
        ids = torch.cat([segments, last], dim=1).unflatten(1, (-1, chunk_len))
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

    def same_document(self) -> Tensor:
        """``[B, N, C, C]`` bool: whether tokens i and j of a chunk are of the same document."""
        return self.ids.unsqueeze(-1) == self.ids.unsqueeze(-2)
