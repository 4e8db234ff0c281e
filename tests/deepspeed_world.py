"""Runs a function in real processes of its own, each a rank of a world, for DeepSpeed: it keeps global state."""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from longreach.framework.deepspeed.engine import Engine

# What the processes share with the one that they are forked from, so that they start at once.
PRELOAD = [
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "longreach.framework.checkpoint",
    "longreach.framework.trainer",
]


def run_world(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 100.0) -> list[Any]:
    """``[fn(rank, *args) for each rank]``, run by ``ranks`` new processes; a single one joins no world.

    Args:
        fn: a top-level function of a test module.
        ranks: how many.
        args: picklable.
        timeout: seconds after which the processes are killed and the test fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}):
        multiprocessing.forkserver.ensure_running()
    call = (sys.modules[fn.__module__].__file__, fn.__qualname__, args)
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(prefix="longreach-world-") as directory:
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                pipes.append(ours)
                process = context.Process(target=_rank, args=(rank, ranks, f"{directory}/store", theirs, call))
                processes.append(process)
                process.start()
                theirs.close()
            return _results(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _results(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} gave no answer in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, "the process died"
            if not good:
                raise RuntimeError(f"rank {waiting[pipe]} of {len(pipes)}: {value}")
            results[waiting[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(rank: int, ranks: int, store: str, pipe: Connection, call: tuple[str, str, tuple[Any, ...]]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tempfile.tempdir = str(Path(store).parent)
    sys.path.insert(0, str(Path(__file__).parent))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        path, name, args = call
        spec = importlib.util.spec_from_file_location(f"world_{Path(path).stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        answer = (True, getattr(module, name)(rank, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))  # by value: tensors sent through `send` would die with this process


class SmallModel(nn.Module):
    """A language model with what makes trouble: a tied, a frozen and an oddly sized parameter, and two buffers.

    Args:
        dropout: in training mode, of the hidden values.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 8)
        self.odd = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("lost", torch.ones(2), persistent=False)

    def forward(self, tokens: Tensor, reach_odd: bool = True) -> Tensor:
        """Negative log-likelihoods (fp32) of tokens [B, L] after the first."""
        hidden = self.embed(tokens[:, :-1])
        hidden = hidden + self.dropout(torch.tanh(self.up(hidden))) * self.frozen
        if reach_odd:
            hidden = hidden + self.odd.sum()
        logits = self.head(hidden).flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW with two groups, of which one has no weight decay."""
        decayed = [self.embed.weight, self.up.weight]
        plain = [self.up.bias, self.odd, self.frozen]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)


def whole(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Every tensor of an engine, by name and key, put together from all ranks' pieces; a collective."""
    import torch.distributed as dist

    own = [(name, key, start, values.detach().cpu().clone()) for name, key, start, values in engine.partitions()]
    world = engine.mesh.world
    rows: list[Any] = [own] * world.size
    if world.group is not None:
        dist.all_gather_object(rows, own)
    found: dict[str, dict[str, Tensor]] = {}
    for name, shapes in engine.shapes().items():
        for key, shape in shapes.items():
            pieces = sorted((start, values) for row in rows for n, k, start, values in row if (n, k) == (name, key))
            reached = 0
            for start, values in pieces:
                assert start == reached, (name, key, "a piece is missing or there twice")
                reached += values.numel()
            found.setdefault(name, {})[key] = torch.cat([values for _, values in pieces]).view(shape)
    return found


def batches(steps: int, micro_batches: int, ranks: int) -> Tensor:
    """Tokens [steps, micro_batches, ranks, B, L], the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (steps, micro_batches, ranks, 3, 7), generator=generator)
