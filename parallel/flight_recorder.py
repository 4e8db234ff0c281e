"""The last collectives of this rank, from torch's flight recorder, and the first mismatch between two ranks."""

from __future__ import annotations

import json
import os

RECENT = 12  # collectives that are compared
DUMPS = {"": "_dump_fr_trace_json", " (NCCL)": "_dump_nccl_trace_json"}  # of gloo and NCCL; torch has either or both
_UNEVEN = ("all_to_all", "gather", "scatter", "barrier", "alltoall")  # whose payloads may differ between ranks

Trace = dict[str, str]
"""Collectives in order, by "group.number" (as torch counts them): a description such as "all_reduce of 3 Float"."""


def enable() -> None:
    """Have torch record the last collectives, those of NCCL too; before the world is joined."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "32")


def recent_collectives() -> Trace:
    """The last collectives that this rank started; empty where torch records none."""
    from torch._C import _distributed_c10d as c10d

    entries = []
    for suffix, name in DUMPS.items():
        dump = getattr(c10d, name, None)
        found = json.loads(dump()).get("entries", []) if dump is not None else []
        entries += [(int(entry["time_created_ns"]), int(entry["record_id"]), suffix, entry) for entry in found]
    trace = {}
    for _, _, suffix, entry in sorted(entries, key=lambda row: row[:3]):
        if not entry["is_p2p"]:
            key = f"{entry['process_group'][0]}{suffix}.{entry['collective_seq_id']}"
            kind = entry["profiling_name"].rpartition(":")[2].strip("_")
            sizes = "x".join(str(size) for shape in entry["input_sizes"] for size in shape) or "1"
            trace[key] = kind if kind in _UNEVEN else f"{kind} of {sizes} {''.join(entry['input_dtypes'][:1])}"
    return dict(list(trace.items())[-RECENT:])


def first_mismatch(rank: int, own: Trace, other: int, theirs: Trace) -> str:
    """The first collective that differs between two ranks, as one line for the user; "" if none does."""
    for key, what in own.items():
        if theirs.get(key, what) != what:
            group, number = key.split(".")
            return (
                f"exchange {number} of group {group} is {what} on rank {rank} and {theirs[key]} on rank {other}; "
                "all ranks of a group must make the same exchanges in the same order"
            )
    if own and theirs and (last := list(own)[-1]) != (their_last := list(theirs)[-1]):
        return (
            f"rank {rank} waits in {own[last]} (exchange {last.replace('.', ':')}) and rank {other} in "
            f"{theirs[their_last]} (exchange {their_last.replace('.', ':')}); one of them left an exchange out"
        )
    return ""
