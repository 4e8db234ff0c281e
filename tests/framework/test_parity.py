"""Every mixer split over ranks, streamed and token by token against one pass: outputs, carries and all gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import nn

from longreach.framework.mixers import CONFIGS, MIXERS
from longreach.framework.mixers.registry import run_files
from longreach.framework.model import ModelConfig, build_model
from longreach.parallel.span import Span
from longreach.testing import check_mixer

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "examples" / "ema.py"
WIDTH = 12


@dataclass(frozen=True)
class Case:
    """One mixer with its options; taps reach farther than most shards."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    file: str = ""  # that registers it

    def build(self, causal: bool) -> nn.Module:
        torch.manual_seed(1)
        run_files([self.file] if self.file else [])
        config = CONFIGS[self.mixer]() if self.file else getattr(ModelConfig(), self.mixer)
        for name, value in self.options.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        mixer: nn.Module = MIXERS[self.mixer](WIDTH, config, causal=causal)
        return mixer


CASES = {
    "elementwise": Case("elementwise", {"norm_group": 5}),
    "elementwise-plain": Case("elementwise", {"norm_group": 0, "conv_len": 0, "order": 2}),
    "chela-modal": Case("chela", {"heads": 3, "modes": 4}),
    "chela-modal-decay": Case("chela", {"heads": 3, "modes": 2, "decay": True, "arrangement": "parallel"}),
    "chela-free": Case("chela", {"heads": 3, "long_kernel": "free", "long_len": 7}),
    "chela-decaying": Case("chela", {"heads": 3, "long_kernel": "decaying", "long_len": 40}),
    "feedforward_kernel": Case("feedforward_kernel", {"heads": 3, "layers": 2}),
    "feedforward_kernel-amglu": Case("feedforward_kernel", {"heads": 3, "kernel": "amglu", "layers": 3}),
    "feedforward_kernel-ffn": Case("feedforward_kernel", {"heads": 3, "kernel": "ffn", "bias": True}),
    "mamba2": Case("mamba2", {"head_width": 6, "state_size": 5}),
    "mamba2-groups": Case("mamba2", {"head_width": 3, "state_size": 4, "groups": 2, "conv_len": 2}),
    "gated_deltanet": Case("gated_deltanet", {"heads": 4, "key_heads": 2, "key_width": 4, "value_width": 5}),
    "gated_deltanet-channel": Case("gated_deltanet", {"heads": 2, "decay": "channel", "negative_eigenvalues": True}),
    "gated_deltanet-none": Case("gated_deltanet", {"heads": 2, "decay": "none"}),
    "softmax": Case("softmax", {"heads": 3}),
    "ema, of docs/write-a-mixer.md": Case("ema", {"longest": 20.0}, str(EXAMPLE)),
}


def has_both_ways(case: Case) -> bool:
    """A linear attention with decays and the example are causal only."""
    return not (case.options.get("decay") or case.file or getattr(MIXERS[case.mixer], "causal_only", False))


DIRECTIONS = [
    (name, causal) for name, case in CASES.items() for causal in (True, False) if causal or has_both_ways(case)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name, causal", DIRECTIONS)
def test_a_mixer_is_the_same_over_ranks_blocks_and_tokens(name: str, causal: bool, dtype: torch.dtype) -> None:
    """Catches a wrong halo, scan, all-to-all, carry or gradient scale."""
    check_mixer(CASES[name].build(causal), WIDTH, causal=causal, dtype=dtype)


def test_model_decodes_the_logits_of_the_parallel_pass() -> None:
    torch.manual_seed(1)
    mixers = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]
    model = build_model(ModelConfig(vocab=17, width=24, depth=len(mixers), mixers=mixers)).double()
    tokens = torch.randint(0, 17, (2, 9))
    with torch.no_grad():
        whole = model(tokens)
        span = Span(keep_carry=True)
        for i in range(9):
            assert_close(f"token {i}", model(tokens[:, i : i + 1], span)[:, 0], whole[:, i], rel_rms=1e-10)
            span = span.next_block(1)
