"""What the label of a token is, for the loader of packed tokens and for transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of a token that the loss leaves out, as in torch's cross-entropy


def next_token_labels(tokens: Tensor, segments: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
    """The label of each token, ``[..., L]`` int64: the next token of its document, `IGNORE` where there is none.

    Args:
        tokens: ``[..., L]`` int64; `IGNORE` stays no label.
        segments: ``[..., L]`` document ids, or None for one document.
        masked: ``[..., L]`` bool, which tokens are no labels.
    """
    labels = F.pad(tokens[..., 1:], (0, 1), value=IGNORE)
    if segments is not None:
        ends = F.pad(segments[..., 1:] != segments[..., :-1], (0, 1), value=True)
        labels = labels.masked_fill(ends, IGNORE)
    if masked is not None:
        labels = labels.masked_fill(F.pad(masked[..., 1:], (0, 1), value=True), IGNORE)
    return labels
