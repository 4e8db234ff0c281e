"""How much memory a rank of a training needs at least, against what there is."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InputError
from ...parallel.mesh import Mesh, gather_values
from ..config import RunConfig
from ..model import build_model
from ..model.trained import freeze
from .machine import Machine
from .process import num_local_ranks

log = logging.getLogger("longreach.memory")
GIB = 2**30
CERTAIN = 1.5  # times what there is: so much does not fit, whatever options make of the sums
KEPT = {"elementwise": 13, "chela": 23, "feedforward_kernel": 19, "mamba2": 20, "gated_deltanet": 18, "softmax": 8}
"""Tensors ``[tokens, width]`` that the mixer of a block keeps for backward, of those that autograd was seen to save."""
KEPT_OTHERS = 4  # of any other mixer: its normalized input, and three more


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds at once in a training step; a lower bound.

    Attributes:
        parameters, gradients: in the precision of training.
        optimizer: AdamW's two moments, and the fp32 weights where they are a copy.
        activations: that the blocks of the model keep for backward.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "activations")
        return ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in parts)


def tokens_at_a_time(config: RunConfig) -> int:
    """Tokens that a rank processes at a time: of its shard or, where that is streamed, of a block."""
    shard = -(-config.data.seq_len // config.parallel.num_sequence_ranks)
    return config.train.micro_batch_size * min(shard, config.parallel.block_len or shard)


def needed_memory(config: RunConfig, settings: dict[str, Any], on_gpu: bool = False) -> Memory | None:
    """What a rank needs; None where the model cannot be built without memory, for its sizes alone.

    Args:
        config: of the run, with the sizes that the model takes from the data.
        settings: of DeepSpeed.
        on_gpu: without what DeepSpeed keeps in the host's memory then.
    """
    try:
        with torch.device("meta"):
            model = build_model(config.model)
    except RuntimeError:
        return None
    freeze(model, config.train.freeze)
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = settings.get("zero_optimization", {})
    stage, world = zero.get("stage", 0), config.parallel.ranks
    width = 4 if config.train.precision == "fp32" else 2  # bytes of a value
    has_copy = stage > 0 or width == 2
    parameters = width * count // (world if stage == 3 else 1)
    gradients = width * trained // (world if stage >= 2 else 1)
    optimizer = (12 if has_copy else 8) * trained // (world if stage else 1)
    if on_gpu:
        parameters = 0 if zero.get("offload_param") else parameters
        optimizer = 0 if zero.get("offload_optimizer") else optimizer
    mixers, depth = config.model.mixers, config.model.depth
    blocks = [KEPT.get(mixers[i % len(mixers)], KEPT_OTHERS) + 3 * config.model.ffn_ratio for i in range(depth)]
    tensors = depth + max(blocks, default=0) if config.train.recompute else sum(blocks)
    activations = int(tensors * tokens_at_a_time(config) * config.model.width * width)
    return Memory(parameters, gradients, optimizer, activations)


def free_memory(device: torch.device, ranks: int = 1) -> int | None:
    """Bytes that are free for a rank: of its GPU, else of this machine's, shared by ``ranks``; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = Machine().available_memory()
    return None if available is None else available // ranks


def check_memory(config: RunConfig, settings: dict[str, Any], mesh: Mesh) -> None:
    """Compare the two on every rank before the model is built; a collective.

    What may not fit is warned of in one line of the first rank.

    Raises:
        InputError: on all ranks, where one certainly has too little.
    """
    need = needed_memory(config, settings, mesh.device.type == "cuda")
    there = free_memory(mesh.device, num_local_ranks())
    own = [0.0, math.inf] if need is None or there is None else [float(need.total), float(there)]
    rows = gather_values(own, mesh.world)
    rank = max(range(len(rows)), key=lambda rank: rows[rank][0] - rows[rank][1])
    if need is not None and (warning := compare(config, need, rows[rank][1], f"rank {rank}")):
        log.warning("warning: %s", warning)


def compare(config: RunConfig, need: Memory, available: float, who: str = "a rank") -> str:
    """What is wrong where ``available`` bytes are less than ``who`` needs, or nothing.

    Raises:
        InputError: they are certainly too few.
    """
    if need.total <= available:
        return ""
    short = f"{who} needs at least {need.total / GIB:.2f} GiB ({need}) and finds {available / GIB:.2f} GiB"
    room = available / 2 - (need.total - need.activations)  # half is left to all that is not counted
    fitting = room * tokens_at_a_time(config) / (need.activations * config.train.micro_batch_size)
    fix = f"{advice(config, fitting)}; longreach train ... --dry-run measures one rank"
    if need.total > CERTAIN * available and not config.train.compile:  # the compiler may keep less
        raise InputError("data.seq_len", config.data.seq_len, f"does not fit into memory: {short}", fix)
    return f"memory may not suffice: {short}; {fix}"


def advice(config: RunConfig, fitting: float = math.inf) -> str:
    """What a run that needs too much memory could change; of a block, ``fitting`` tokens fit."""
    data, parallel, train = config.data, config.parallel, config.train
    block_len = parallel.block_len // 2 or data.seq_len // parallel.num_sequence_ranks // 8
    if fitting < block_len:
        block_len = 1 << max(0, math.floor(math.log2(max(1.0, fitting))))
    changes = [
        "" if train.micro_batch_size == 1 else "train.micro_batch_size=1",
        "" if train.recompute else "train.recompute=true",
        f"parallel.block_len={max(1, block_len)}" if config.model.causal else "",
        "more parallel.ranks",
        "a further stage of ZeRO (deepspeed=zero3)",
    ]
    return f"try {', '.join(filter(None, changes))}"
