"""`longreach bench models`: models of transformers, alone and adapted, on this machine's processor.

Speed: forward and backward of 8,192 tokens in fp32, of small models with the sizes of heads that the families have, in
one process with the same weights, in turns. Once the first linear layer's mixer alone, once the whole model.

Memory: a training step over one long sequence of a small hybrid, by ``longreach train`` on one rank and on two,
streamed; and by transformers alone, with gradient checkpointing, at growing lengths up to a limit of memory. What it
would take at the full length is told from the slope between the two longest that it could do, which is too little
where memory grows faster than the length.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...framework.runtime.machine import Machine
from . import Bound, check_out, cpu_only, environment, last_line, report_bounds, table_header, table_line, write_report
from .memory import Limits, pack_corpus, watch

LENGTH = 8192  # tokens of the comparison of speed
TURNS, TURN_SECONDS = 3, 60.0  # of each way, after one that is not counted; fewer, once they took so long together
LONGEST = 2**18
SHORTEST = 4096  # of the trials of transformers alone; each further one has twice as many tokens
BLOCK_LEN = 8192  # tokens of a streamed block, over all ranks
RANKS = (1, 2)
STEP_SECONDS = 4 * 3600.0  # that one process may take
SPEED_LIMIT = 2.0  # of the linear layers: transformers' time over ours
ERROR_LIMIT = 1e-4  # of outputs and gradients, relative RMS
PEAK_LIMIT = 3 * 2**30  # bytes of a rank, streamed
LOSS_LIMIT = 1e-5  # of the loss on two ranks against one, relative
LEAST_GAIN = 8.0  # times the memory of a streamed rank that transformers alone would take
ALONE = "transformers alone"

SPEED_HEADER = table_header(["model", "part", ALONE, "adapted", "ratio", "difference"])
STEP_HEADER = table_header(["model", "how", "tokens", "peak memory of a rank", "seconds", "loss"])

_COMMON: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
_COMMON |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 96}
_DELTA |= {"linear_value_head_dim": 192}
FAMILIES: dict[str, dict[str, Any]] = {  # of the comparison of speed; the first layer is linear
    "olmo_hybrid": {**_HEADS, **_DELTA, "layer_types": _LAYERS},  # gated delta rule
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 128, "n_groups": 1, "num_hidden_layers": 2},
    "kimi_linear": {  # a decay of each channel
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "layer_types": _LAYERS,
        "mlp_layer_types": ["dense"] * 3,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 48,
        "v_head_dim": 64,
        "linear_head_dim": 128,
        "linear_num_heads": 2,
    },
    "bamba": {  # Mamba-2 and attention
        **_HEADS,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
    },
}
MIXERS = ("linear_attn", "mixer", "mamba", "self_attn")  # their names in a layer
_LONG = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
HYBRIDS: dict[str, dict[str, Any]] = {  # of the comparison of memory
    "lfm3": {  # short convolutions and attention to a window
        **_LONG,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 256,
        "layer_types": ["conv", "sliding_attention"] * 2,
    },
    "olmo_hybrid": {  # gated delta rule, and one layer of attention to everything with one narrow head
        **_LONG,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 48,
        "linear_value_head_dim": 96,
    },
}


@dataclass(frozen=True)
class Speed:
    """Forward and backward of one part of a model.

    Attributes:
        family: a name in `FAMILIES`.
        part: the class of the mixer of the first layer, or "whole model".
        alone, adapted: seconds by transformers alone and by ours, the medians.
        difference: of the output and the gradients, the largest relative RMS of any.
    """

    family: str
    part: str
    alone: float
    adapted: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.alone / self.adapted


@dataclass(frozen=True)
class Step:
    """One training step over one sequence.

    Attributes:
        model: a name in `HYBRIDS`.
        how: `ALONE`, or on how many ranks, streamed.
        tokens: of the sequence.
        memory_bytes: peak resident memory of a rank.
        seconds: of the step.
        loss: nats per token.
    """

    model: str
    how: str
    tokens: int
    memory_bytes: float
    seconds: float
    loss: float


def build(family: str, shape: dict[str, Any]) -> Any:
    """A model of transformers with random weights of a fixed seed, in fp32.

    Raises:
        InputError: transformers is not installed, or does not know the family.
    """
    import torch

    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise InputError("bench models", family, "needs transformers", "pip install 'longreach[hf]'") from None
    try:
        config = AutoConfig.for_model(family, **{**_COMMON, **shape})
    except ValueError:
        allowed = "a family that the installed transformers knows"
        raise InputError("bench models", family, allowed, "install a newer one") from None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".dt_bias"):  # as Mamba-2 begins: steps from 0.001 to 0.1; some families set all to 1
                steps = torch.logspace(-3, -1, parameter.numel()).view(parameter.shape)
                parameter.copy_(steps.expm1().log())
    return model


def speeds(family: str) -> Iterator[Speed]:
    """Of the mixer of the first layer, then of the whole model."""
    import torch

    from ...framework.hf import adapt
    from ...framework.hf.current import View, use
    from ...parallel.span import Span

    alone = build(family, FAMILIES[family])
    adapted = adapt(copy.deepcopy(alone))
    tokens = torch.randint(0, _COMMON["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(0))
    name = next(n for n, _ in alone.named_modules() if n.endswith(tuple(f".layers.0.{last}" for last in MIXERS)))
    calls = (
        _call_of(alone, name, lambda: alone(tokens, use_cache=False)),
        _call_of(adapted, name, lambda: adapted(tokens, span=Span())),
    )
    mixers = alone.get_submodule(name), adapted.get_submodule(name)

    def mix(which: int) -> list[Any]:
        hidden, kwargs = calls[which]
        x = hidden.clone().requires_grad_()
        if which:
            with use(View(Span())):
                y = mixers[which](x, **kwargs)
        else:
            y = mixers[which](x, **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(weight[: y.numel()].view(y.shape))
        return [y.detach(), x.grad]

    def whole(which: int) -> list[Any]:
        logits = (adapted(tokens, span=Span()) if which else alone(tokens, use_cache=False)).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
        loss.backward()
        return [logits.detach()]

    weight = torch.randn(LENGTH * _COMMON["hidden_size"], generator=torch.Generator().manual_seed(1))
    yield _in_turns(family, type(mixers[0]).__name__, mix, mixers)
    yield _in_turns(family, "whole model", whole, (alone, adapted))


def _call_of(model: Any, name: str, run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """The hidden states and the other arguments with which a model calls its mixer ``name``."""
    import torch

    found: list[tuple[Any, dict[str, Any]]] = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append((hidden.detach(), {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    handle = model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    return found[0]


def _in_turns(family: str, part: str, run: Callable[[int], list[Any]], modules: tuple[Any, Any]) -> Speed:
    """Time both ways of ``run`` (0: transformers alone; 1: adapted) in turns, and compare what they compute."""
    seconds: list[list[float]] = [[], []]
    found: list[list[Any]] = [[], []]
    for turn in range(TURNS + 1):
        if sum(map(sum, seconds)) > TURN_SECONDS:
            break
        for which in (0, 1) if turn % 2 else (1, 0):
            modules[which].zero_grad(set_to_none=True)
            started = time.perf_counter()
            values = run(which)
            if turn:
                seconds[which].append(time.perf_counter() - started)
            else:
                parameters = modules[which].named_parameters()
                found[which] = [*values, *(p.grad for _, p in sorted(parameters) if p.grad is not None)]
    difference = max(_difference(x, y) for x, y in zip(*found, strict=True))
    return Speed(family, part, statistics.median(seconds[0]), statistics.median(seconds[1]), difference)


def _difference(x: Any, y: Any) -> float:
    """The relative RMS of ``y - x``."""
    x, y = x.double(), y.double()
    return float((y - x).norm() / x.norm().clamp(min=1e-30))


def trained(name: str, place: Path, packed: Path, tokens: int, ranks: int, threads: int) -> Step:
    """A streamed step by ``longreach train`` on so many ranks.

    Args:
        place: directory of the model.

    Raises:
        InputError: it failed, or took too long.
    """
    how = f"{ranks} {'rank' if ranks == 1 else 'ranks'}, streamed"
    with tempfile.TemporaryDirectory() as directory:
        run_dir, log = Path(directory) / "run", Path(directory) / "log"
        words = [
            f"run.dir={run_dir}",
            f"model.pretrained={place}",
            f"data.source={packed}",
            f"data.seq_len={tokens}",
            "data.valid_fraction=0",
            f"parallel.ranks={ranks}",
            f"parallel.block_len={max(1, BLOCK_LEN // ranks)}",
            "optim.warmup_steps=0",
            "train.steps=1",
            f"train.threads={max(1, threads // ranks)}",
            "train.recompute=false",
            "train.validate_every=0",
            "monitor.sample_len=0",
            "monitor.plot=false",
            "monitor.tensorboard=false",
        ]
        with open(log, "wb") as file:
            command = [sys.executable, "-m", "longreach", "train", "extend", *words]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=cpu_only())
        late = watch(process, Limits(STEP_SECONDS, math.inf))
        if late or process.returncode:
            what = f"{name}, {how}, {tokens} tokens"
            raise InputError(what, late or process.returncode, f"exit code 0; it said: {last_line(log)}")
        row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    return Step(name, how, tokens, row["peak_memory_bytes"], row["step_seconds"], row["loss"])


def alone(name: str, place: Path, tokens: int, threads: int, memory_bytes: float) -> Step | str:
    """A step by transformers alone, in a process of its own; returns what it ran out of, if it did.

    Raises:
        InputError: it failed in another way.
    """
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "out", Path(directory) / "log"
        command = [sys.executable, "-m", __name__, str(place), str(tokens), str(threads), str(int(memory_bytes))]
        with open(out, "wb") as found, open(log, "wb") as said:
            process = subprocess.Popen(command, stdout=found, stderr=said, env=cpu_only())
        exceeded = watch(process, Limits(STEP_SECONDS, memory_bytes))
        if exceeded:
            return exceeded
        if process.returncode == -signal.SIGKILL or "allocate memory" in log.read_text(errors="replace"):
            return "memory"
        if process.returncode:
            what = f"{name}, {ALONE}, {tokens} tokens"
            raise InputError(what, process.returncode, f"exit code 0; it said: {last_line(log)}")
        row = json.loads(last_line(out))
    return Step(name, ALONE, tokens, **row) if row["memory_bytes"] <= memory_bytes else "memory"


def step_alone(place: str, tokens: int, threads: int, memory_bytes: int) -> dict[str, float]:
    """A step of the model in ``place`` as its users would take it, with gradient checkpointing and AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = mapped + memory_bytes + 2**31  # of address space: what is beyond is refused, not taken from others
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    started = time.monotonic()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    seconds = time.monotonic() - started
    return {"memory_bytes": Machine().resident_memory(peak=True) or 0, "seconds": seconds, "loss": float(loss)}


def steps(name: str, directory: Path, packed: Path, longest: int, threads: int, memory_bytes: float) -> Iterator[Step]:
    """All steps of one of `HYBRIDS`, printed as they are done: ours, then those of transformers alone."""
    place = directory / name
    build(name, HYBRIDS[name]).save_pretrained(place)
    for ranks in RANKS:
        yield _told(trained(name, place, packed, longest, ranks, threads))
    for tokens in (SHORTEST << n for n in range(1 + (longest // SHORTEST).bit_length())):
        if tokens > longest:
            return
        done = alone(name, place, tokens, threads, memory_bytes)
        if isinstance(done, str):
            print(table_line([name, ALONE, f"{tokens:,}", f"out of {done}", "", ""]), flush=True)
            return
        yield _told(done)


def _told(step: Step) -> Step:
    gib = f"{step.memory_bytes / 2**30:.2f} GiB"
    cells = [step.model, step.how, f"{step.tokens:,}", gib, f"{step.seconds:.1f}", f"{step.loss:.6f}"]
    print(table_line(cells), flush=True)
    return step


def needed_alone(done: list[Step], tokens: int) -> float:
    """Bytes that transformers alone would take for so many tokens, by the slope between its two longest trials.

    NaN where there are fewer.
    """
    found = sorted((one.tokens, one.memory_bytes) for one in done if one.how == ALONE)
    if found and found[-1][0] >= tokens:
        return found[-1][1]
    if len(found) < 2:
        return math.nan
    (short, less), (long, more) = found[-2:]
    return more + (tokens - long) * (more - less) / (long - short)


def run(out: Path, threads: int = 0, longest: int = LONGEST, memory_gib: float = 12.0) -> int:
    """Compare speed, then memory; writes ``models-cpu.json`` into ``out``.

    Args:
        out: directory of the results.
        threads: number of CPU threads; 0 takes all.
        longest: tokens of the streamed step.
        memory_gib: limit of the resident memory of transformers alone.

    Returns:
        The exit code: 1 where a bound does not hold.
    """
    check_out(out)
    import torch

    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    where = environment("cpu", threads)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(SPEED_HEADER)
    timed: list[Speed] = []
    for family in FAMILIES:
        for one in speeds(family):
            timed.append(one)
            cells = [f"{one.alone:.2f} s", f"{one.adapted:.2f} s", f"{one.ratio:.2f}", f"{one.difference:.1e}"]
            print(table_line([one.family, one.part, *cells]), flush=True)
    print(STEP_HEADER)
    free = Machine().available_memory()
    memory_bytes = min(memory_gib * 2**30, 0.75 * free if free else math.inf)
    done: list[Step] = []
    report = {
        "command": f"longreach bench models --threads {threads} --longest {longest} --memory-gib {memory_gib:g}",
        "environment": where,
        "speed": {"tokens": LENGTH, "rows": [{**asdict(one), "ratio": one.ratio} for one in timed]},
        "families": FAMILIES,
        "hybrids": HYBRIDS,
    }
    path = out / "models-cpu.json"
    with tempfile.TemporaryDirectory() as directory:
        packed = pack_corpus(Path(directory), longest + 1)
        for name in HYBRIDS:
            done += steps(name, Path(directory), packed, longest, threads, memory_bytes)
            bounds = _bounds(timed, done, longest)
            needed = {name: needed_alone([one for one in done if one.model == name], longest) for name in HYBRIDS}
            report["steps"] = {"block_len": BLOCK_LEN, "rows": [asdict(one) for one in done], "needed_alone": needed}
            write_report({**report, "bounds": [bound.as_json() for bound in bounds]}, path)
    for name, found in needed.items():
        print(f"{name}: {ALONE} would need {found / 2**30:.0f} GiB or more for {longest:,} tokens")
    print(f"written: {path}")
    return report_bounds(bounds)


def _bounds(timed: list[Speed], done: list[Step], longest: int) -> list[Bound]:
    bounds = []
    for one in timed:
        if one.part != "whole model":
            what = f"{one.family}, {one.part}, {ALONE} over adapted, time"
            bounds.append(Bound(what, one.ratio, ">=", SPEED_LIMIT))
        bounds.append(Bound(f"{one.family}, {one.part}, difference", one.difference, "<=", ERROR_LIMIT))
    for name in dict.fromkeys(step.model for step in done):
        own = [step for step in done if step.model == name]
        streamed = [step for step in own if step.how != ALONE]
        for step in streamed:
            what = f"{name}, {step.how}, bytes of a rank at {longest:,} tokens"
            bounds.append(Bound(what, step.memory_bytes, "<", float(PEAK_LIMIT)))
        losses = [step.loss for step in streamed]
        apart = (max(losses) - min(losses)) / min(losses)
        bounds.append(Bound(f"{name}, loss on {RANKS[-1]} ranks and on 1, relative", apart, "<=", LOSS_LIMIT))
        what = f"{name}, memory of {ALONE} over that of a rank at {longest:,} tokens"
        most = max(step.memory_bytes for step in streamed)
        bounds.append(Bound(what, needed_alone(own, longest) / most, ">=", LEAST_GAIN))
    return bounds


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    print(json.dumps(step_alone(place, *map(int, numbers))))
