"""The bytes that each verb exchanges, counted in a run, against the formulas in README."""

from __future__ import annotations

import pytest
import torch
from helpers import run_distributed

from longreach.framework.model import ModelConfig, build_model
from longreach.parallel.mesh import Axis
from longreach.parallel.span import Span, shard_lengths

B, D, H, VOCAB = 2, 12, 3, 17
FP32, IDS = 4, 16  # bytes of a number; of a row's first and last document id


def count(axis: Axis, mixer: str, options: dict[str, object], length: int, packed: bool) -> dict[tuple[str, str], int]:
    """Bytes by (layer, verb) of one forward and backward pass of a model with that one mixer in two blocks."""
    config = ModelConfig(vocab=VOCAB, width=D, depth=2, mixers=[mixer])
    for name, value in options.items():
        assert hasattr(getattr(config, mixer), name)
        setattr(getattr(config, mixer), name, value)
    model = build_model(config)
    lengths = shard_lengths(length, axis.size)
    first = sum(lengths[: axis.rank])
    ids = (torch.arange(length) // 5).expand(B, -1)[:, first : first + lengths[axis.rank]] if packed else None
    span = Span(axis=axis, lengths=lengths, segments=ids)
    tokens = torch.zeros(B, lengths[axis.rank], dtype=torch.int64)
    nll, penalty = model(tokens, span, tokens)
    (nll.sum() + penalty).backward()
    return dict(span.traffic.bytes)


def scans(mixer: str, packed: bool) -> int:
    """Bytes of the states of one block, forward and backward."""
    decay = B if packed else 1  # A is one number, or one for each row
    if mixer == "elementwise":
        state = 2 * 7 * D
        return 2 * FP32 * B * state + FP32 * decay
    if mixer == "feedforward_kernel":
        state = H * (D // H) * (D // H + 1)
        return 2 * FP32 * B * state + FP32 * decay
    if mixer == "mamba2":  # 2 D / 8 heads with a state [5, 8] each, and a decay for each row and head
        return 2 * FP32 * B * 2 * D * 5 + FP32 * B * (2 * D // 8)
    if mixer == "gated_deltanet":  # A is a matrix for each row and head
        return 2 * FP32 * B * H * 3 * 4 + FP32 * B * H * 3 * 3
    attention = H * (D // 2 // H) * (2 * D // H)
    total = 2 * FP32 * B * attention + FP32 * decay
    if mixer == "chela-modal":
        modes = 4
        total += 2 * 2 * FP32 * B * D * modes + 2 * FP32 * decay * D * modes
    return total


def halos(mixer: str, axis_rank: int, size: int) -> int:
    """Bytes of the neighbouring tokens of one block: to the next rank forward, to the one before backward."""
    widths = {"softmax": 0, "mamba2": 2 * D + 2 * 5, "gated_deltanet": H * (3 + 3 + 4)}
    width = D if mixer.startswith("chela") else widths.get(mixer, 3 * D)
    forward, backward = axis_rank < size - 1, axis_rank > 0
    return FP32 * B * 3 * width * (forward + backward)


MIXERS = {
    "elementwise": ("elementwise", {}),
    "feedforward_kernel": ("feedforward_kernel", {"heads": H}),
    "mamba2": ("mamba2", {"head_width": 8, "state_size": 5}),
    "gated_deltanet": ("gated_deltanet", {"heads": H, "key_width": 3, "value_width": 4}),
    "chela-modal": ("chela", {"heads": H, "modes": 4}),
    "chela-free": ("chela", {"heads": H, "long_kernel": "free", "long_len": 9}),
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_bytes_equal_the_formulas(name: str, packed: bool, ranks: int) -> None:
    """Catches an exchange that nobody needs, or that grows with the sequence."""
    for length in (ranks * 8, ranks * 64):
        rows = run_distributed(count, ranks, *MIXERS[name], length, packed)
        for rank, row in enumerate(rows):
            for block in ("blocks.0", "blocks.1"):
                assert row[block, "scan"] == scans(name, packed)
                assert row.get(("segments", "scan"), 0) == (B * IDS if packed else 0)  # once for all layers
                assert row[block, "halo"] == halos(name, rank, ranks)
                if name == "chela-free":
                    own, local, reach = D // ranks, length // ranks, 8
                    # Tokens for channels, and back, in both passes: what grows; or, if less, the nearest tokens.
                    sent = 2 * (local * (D - own) + (ranks - 1) * local * own)
                    if local == 64:
                        sent = reach * D * ((rank < ranks - 1) + (rank > 0))
                    assert row[block, "by_channel"] == FP32 * B * sent
                else:
                    assert (block, "by_channel") not in row


@pytest.mark.parametrize("ranks", [2, 3])
def test_softmax_sends_the_sequence(ranks: int) -> None:
    length = ranks * 8
    rows = run_distributed(count, ranks, "softmax", {"heads": H}, length, False)
    for rank, row in enumerate(rows):
        own = H // ranks + (rank < H % ranks)
        local, head = length // ranks, D // H
        there = 3 * local * (H - own) * head + (ranks - 1) * local * own * head
        back = local * (H - own) * head + 3 * (ranks - 1) * local * own * head
        assert row["blocks.0", "by_channel"] == FP32 * B * (there + back)
        assert ("blocks.0", "scan") not in row
