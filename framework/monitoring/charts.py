"""The layout of a run in TensorBoard: five questions, each with the charts that answer it, and the table of runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from ..config import RunConfig, as_written

TAGS = {
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "compute_seconds": "speed/compute_seconds",
    "exchange_seconds": "speed/exchange_seconds",
    "zero_seconds": "speed/zero_seconds",
    "optimizer_seconds": "speed/optimizer_seconds",
    "data_wait_seconds": "speed/data_wait_seconds",
    "save_seconds": "speed/save_seconds",
    "wait_seconds": "speed/wait_seconds",
    "waited_for_slowest_seconds": "speed/waited_for_slowest_seconds",
    "slowest_rank": "speed/slowest_rank",
    "peak_memory_bytes": "memory/peak_bytes",
    "skipped_steps": "health/skipped_steps",
    "outside_range": "health/outside_range",
    "bytes_scan": "exchange/scan_bytes",
    "bytes_halo": "exchange/halo_bytes",
    "bytes_by_channel": "exchange/by_channel_bytes",
}
"""The scalars that are not below ``train/`` or ``validation/``, by their names in the files of rows."""

MAX_HOSTS = 16  # that a chart of the layout shows; the tags have all
PARTS = ("compute", "exchange", "zero", "optimizer", "data_wait", "save")


def layout(config: RunConfig, hosts: Sequence[str] = ()) -> dict[str, dict[str, list[Any]]]:
    """The layout for `SummaryWriter.add_custom_scalars`: {question: {chart: tags}}.

    Args:
        config: of the run.
        hosts: names of those on which the ranks are.
    """
    health = {
        "gradient norm": ["train/grad_norm"],
        "learning rate": ["train/lr"],
        "penalty on weights": ["train/penalty"],
        "steps skipped so far": ["health/skipped_steps"],
        "peak memory of a rank, bytes": ["memory/peak_bytes"],
    }
    if "elementwise" in config.model.mixers[: config.model.depth]:
        health["pairs outside the series' safe range"] = ["health/outside_range"]
    shown = hosts[:MAX_HOSTS]
    if shown:
        health["memory left on each host, bytes"] = [f"hosts/{host}/available_memory_bytes" for host in shown]
        health["disk left for the run, by host, bytes"] = [f"hosts/{host}/free_disk_bytes" for host in shown]
    times = {"seconds of a step on rank 0": [f"speed/{part}_seconds" for part in PARTS]}
    if shown and config.parallel.ranks > 1:
        times["seconds of a step that ranks wait, mean by host"] = [f"hosts/{host}/wait_seconds" for host in shown]
        times["seconds that the others wait for the slowest rank"] = ["speed/waited_for_slowest_seconds"]
        times["the slowest rank"] = ["speed/slowest_rank"]
    questions = {
        "Is it learning?": {
            "loss, nats per token": ["train/loss", "validation/loss"],
            "bits per token": ["train/bits_per_token", "validation/bits_per_token"],
        },
        "Is it fast?": {
            "tokens per second": ["speed/tokens_per_second"],
            "seconds of a step": ["speed/step_seconds"],
        },
        "Is it healthy?": health,
        "Where does the time go?": times,
        "Does it use its context?": {"gain of context, bits per token": ["validation/gain_of_context"]},
    }
    if config.data.sources:
        tags = [f"validation/loss/{name}" for name in config.data.sources]
        questions["Is it learning?"]["held-out loss of each source, nats per token"] = tags
    if config.task.name != "language":
        del questions["Does it use its context?"]
        questions["Is it learning?"] = {
            "loss": ["train/loss", "validation/loss"],
            "what the task measures": ["validation/(accuracy|rmse|mae)"],
        }
    if config.data.curriculum:
        questions["Is it learning?"]["tokens of a sequence"] = ["train/seq_len"]
    # TensorBoard takes each for a pattern that a tag begins with.
    return {
        question: {title: ["Multiline", [f"{tag}$" for tag in tags]] for title, tags in charts.items()}
        for question, charts in questions.items()
    }


def hyperparameters(config: RunConfig) -> dict[str, float | str]:
    """The hyperparameters in which runs differ, by short names; see `as_written`."""
    tree = as_written(config)
    model, data, optim, train = (tree[name] for name in ("model", "data", "optim", "train"))
    shown = {
        "mixers": ", ".join(model["mixers"]),
        "task": tree["task"]["name"],
        "data": ", ".join(sorted(data["sources"])) or data["name"] or data["source"],
        "ranks": config.parallel.ranks,
        "sequence_ranks": config.parallel.num_sequence_ranks,
        "block_len": config.parallel.block_len,
        "deepspeed": tree["deepspeed"] if isinstance(tree["deepspeed"], str) else "keys of its own",
        "seed": config.run.seed,
        **{name: model[name] for name in ("width", "depth", "vocab")},
        **{name: data[name] for name in ("seq_len", "batch_size")},
        **{name: optim[name] for name in ("lr", "warmup_steps", "weight_decay")},
        **{name: train[name] for name in ("precision", "steps")},
    }
    first: dict[str, float | str] = {}
    for key in config.monitor.hparams:
        section, _, name = key.rpartition(".")
        value = reduce(lambda place, part: place[part], key.split("."), tree)
        has_column = name in shown and section in ("model", "data", "optim", "train", "run")
        first[name if has_column else key] = value if isinstance(value, (int, float)) else str(value)
    return first | shown
