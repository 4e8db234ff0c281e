"""`longreach bench network`: training steps on two hosts, over links of 1 Gbit/s and 100 Mbit/s and without a limit.

The hosts are network namespaces of this machine (so it needs root), each with one rank of one thread, joined by a veth
link whose rate `tc tbf` limits. Every step runs with each rate in turns, so that other load slows all alike. The models
are the quickstart's with one mixer in all layers: `elementwise`, `chela`, and softmax attention with all-to-alls
(Ulysses) and as ring attention.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...errors import InputError
from . import Bound, check_out, cpu_only, environment, last_line, report_bounds, table_header, table_line, write_report

if TYPE_CHECKING:
    from .host import Found, Job

METHODS = {
    "elementwise": ["model.mixers=[elementwise]", "data.batch_size=2"],
    "chela": ["model.mixers=[chela]", "data.batch_size=2"],
    "Ulysses": ["model.mixers=[softmax]", "data.batch_size=1"],
    "ring attention": ["model.mixers=[ring_attention]", "data.batch_size=1"],
}
OURS = ("elementwise", "chela")
RATES = {"loopback": 0.0, "1 Gbit/s": 1e9, "100 Mbit/s": 1e8}  # bits a second; 0: no limit
SHORTEST, LONGEST, GROWTH = 8192, 131_072, 4  # tokens of a sequence; each has so many times more
PEERS_LONGEST = 32_768  # of softmax attention, whose step takes minutes beyond
TRAIN: list[str] = []  # further settings
BUDGET, MOST = 60.0, 5  # seconds for which the steps of a length are repeated, and the most times
HOST_SECONDS = 3600.0  # that a method may take
RATIO_AT, RATIO_LIMIT = 32_768, 0.70  # tokens, and the least share of the speed without a limit, over the slowest link
ERROR_LIMIT = 0.25  # of the cost model, relative
INTERFACE, NETWORK, PORT = "lr0", "10.213.9", 29_500
HEADER = table_header(
    [
        "method",
        "tokens",
        "link",
        "tokens/s per host",
        "of loopback",
        "seconds of a step",
        "waiting",
        "predicted",
        "bytes of states, halos",
        "of tokens, keys, values",
        "of the reduction",
    ]
)


class Row(NamedTuple):
    """What was found of a method at one length and rate; ``loopback`` is the same without a limit."""

    method: str
    found: Found
    loopback: Found

    @property
    def ratio(self) -> float:
        """Of its speed to that without a limit."""
        return self.loopback.seconds / self.found.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of one of the two hosts."""
        return self.found.sequences * self.found.tokens / 2 / self.found.seconds


def overrides(method: str) -> list[str]:
    """The overrides that make the config ``quickstart`` that of a method."""
    return [
        "model.vocab=256",
        "parallel.ranks=2",
        "parallel.sequence=2",
        "train.threads=1",
        "train.steps=1",
        "deepspeed=slow_network",
        *METHODS[method],
        *TRAIN,
    ]


def why_not() -> str:
    """Why two hosts cannot be made here; "" if they can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"there is no command {' or '.join(missing)} (iproute2)" if missing else ""


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """The names of two network namespaces that a veth link joins; their addresses end in .1 and .2.

    Raises:
        InputError: they cannot be made here.
    """
    if why := why_not():
        raise InputError("bench", "network", f"needs two network namespaces: {why}", "run it as root, with iproute2")
    key = uuid.uuid4().hex[:6]
    names, ends = [f"bench{number}-{key}" for number in (1, 2)], [f"b{number}{key}" for number in (1, 2)]
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that they are deleted
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            _ip("link", "set", end, "netns", name, "name", INTERFACE)
            _ip("-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)
        signal.signal(signal.SIGTERM, before)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise InputError("bench", "network", f"ip {' '.join(words)}: {done.stderr.strip()}", "run it as root")


def steps(hosts: Sequence[str], method: str, job: Job) -> tuple[int, dict[str, dict[str, float]], list[Found]]:
    """Parameters of the model, the links, and what was found of a method.

    Raises:
        InputError: a host failed, or both took more than `HOST_SECONDS`.
    """
    from .host import Found

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "job.json").write_text(json.dumps(asdict(job)))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, host in enumerate(hosts):
                environ = cpu_only(
                    RANK=str(rank),
                    WORLD_SIZE=str(len(hosts)),
                    LOCAL_RANK="0",
                    LOCAL_WORLD_SIZE="1",
                    MASTER_ADDR=f"{NETWORK}.1",
                    MASTER_PORT=str(PORT),
                    GLOO_SOCKET_IFNAME=INTERFACE,
                    OMP_NUM_THREADS="1",
                )
                command = ["ip", "netns", "exec", host, sys.executable, "-m", f"{__package__}.host", name]
                with open(directory / f"log{rank}", "wb") as file:
                    processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environ))
            _wait(processes, directory, method)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        report = json.loads((directory / "found.json").read_text())
        return report["num_parameters"], report["links"], [Found(**one) for one in report["found"]]


def _wait(processes: Sequence[subprocess.Popen[bytes]], directory: Path, method: str) -> None:
    deadline = time.monotonic() + HOST_SECONDS
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                said = last_line(directory / f"log{rank}")
                raise InputError(f"exit code of host {rank + 1}, {method}", code, f"must be 0; it said: {said}")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            raise InputError(f"exit code, {method}", f"none after {HOST_SECONDS:g} s", "must be 0")
        time.sleep(0.1)


def as_line(row: Row) -> str:
    """A row of the Markdown table."""
    found, sent = row.found, row.found.bytes
    groups = [("scan", "halo", "segments"), ("by_channel", "ring", "ring_grads"), ("reduction",)]
    return table_line(
        [
            row.method,
            f"{found.tokens:,}",
            found.link,
            f"{row.tokens_per_second:,.0f}",
            f"{row.ratio:.2f}",
            f"{found.seconds:.2f}",
            f"{found.waiting_seconds:.2f}",
            f"{found.predicted_seconds:.2f} ({found.error:+.0%})",
            *(f"{sum(sent.get(verb, 0) for verb in verbs):,}" for verbs in groups),
        ]
    )


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot the share of the speed without a limit, and the bytes of a step, against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colors = {method: f"C{number}" for number, method in enumerate(METHODS)}
    styles = dict(zip(list(RATES)[::-1], ("-", "--", ":")))
    for method in dict.fromkeys(row.method for row in rows):
        for link in list(RATES)[1:]:
            some = [row for row in rows if row.method == method and row.found.link == link]
            lengths = [row.found.tokens for row in some]
            label = f"{method}, {link}"
            panels[0].semilogx(
                lengths, [row.ratio for row in some], styles[link], marker="o", color=colors[method], label=label
            )
        panels[1].loglog(
            lengths, [sum(row.found.bytes.values()) for row in some], marker="o", color=colors[method], label=method
        )
    panels[0].axhline(RATIO_LIMIT, color="grey", linestyle=":")
    panels[0].set(ylabel="tokens/s, of those without a limit", ylim=(0, 1.1))
    panels[1].set(ylabel="bytes that a host sends in a step")
    ticks = sorted({row.found.tokens for row in rows})
    for axes in panels:
        axes.set(xlabel="tokens of a sequence")
        axes.set_xticks(ticks, [f"{tokens / 1024:g}k" for tokens in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def lengths_of(method: str, longest: int) -> list[int]:
    """The lengths at which a method is measured."""
    most = longest if method in OURS else min(longest, PEERS_LONGEST)
    return [SHORTEST * GROWTH**n for n in range(32) if SHORTEST * GROWTH**n <= most]


def run(out: Path, longest: int = LONGEST) -> int:
    """Train on two hosts over each link; writes ``network-cpu.json`` and ``.png`` into ``out``.

    Args:
        out: directory of the results.
        longest: tokens of the longest sequence.

    Returns:
        The exit code: 1 where a bound does not hold.
    """
    from .host import Job

    if longest < SHORTEST:
        raise InputError("--longest", longest, f"at least {SHORTEST}")
    with two_hosts() as hosts:
        check_out(out)
        where = environment("cpu", len(hosts))
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        rows: list[Row] = []
        models = {}
        for method in METHODS:
            job = Job(overrides(method), lengths_of(method, longest), RATES, INTERFACE, BUDGET, MOST)
            num_parameters, links, found = steps(hosts, method, job)
            models[method] = {"num_parameters": num_parameters, "links": links}
            by_length = {one.tokens: one for one in found if one.link == next(iter(RATES))}
            some = [Row(method, one, by_length[one.tokens]) for one in found]
            print(f"{'' if rows else HEADER + chr(10)}" + "\n".join(as_line(row) for row in some), flush=True)
            rows += some
    bounds = _bounds(rows)
    report = {
        "command": f"longreach bench network --longest {longest}",
        "environment": where,
        "models": models,
        "rows": [
            {
                "method": row.method,
                **asdict(row.found),
                "tokens_per_second_per_host": row.tokens_per_second,
                "of_loopback": row.ratio,
                "error": row.found.error,
            }
            for row in rows
        ],
        "bounds": [bound.as_json() for bound in bounds],
    }
    path = out / "network-cpu.json"
    write_report(report, path)
    plot(rows, path.with_suffix(".png"), f"two hosts, {where['device']}")
    print(f"written: {path}, {path.with_suffix('.png')}")
    return report_bounds(bounds)


def _bounds(rows: Sequence[Row]) -> list[Bound]:
    slowest = list(RATES)[-1]
    share = f"tokens/s at {RATIO_AT:,} tokens over {slowest}, of loopback"
    bounds = [
        Bound(f"{row.method}, {share}", row.ratio, ">=", RATIO_LIMIT)
        for row in rows
        if row.method in OURS and (row.found.tokens, row.found.link) == (RATIO_AT, slowest)
    ]
    worst = max(rows, key=lambda row: (math.isnan(row.found.error), abs(row.found.error)))
    what = f"error of the cost model, of all rows ({worst.method}, {worst.found.tokens:,} tokens, {worst.found.link})"
    return [*bounds, Bound(what, abs(worst.found.error), "<=", ERROR_LIMIT)]
