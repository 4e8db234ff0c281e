"""`longreach doctor`: check this machine before a job; the checks are in `launch.doctor`."""

from __future__ import annotations

import argparse
import json
import socket
import time
from dataclasses import asdict
from typing import Any

from ... import __version__
from ...errors import InputError

SUMMARY = "check this machine before a job"
DESCRIPTION = """Check this machine before a job: backends, versions, network interfaces, rendezvous, limits, and the
speed of memory, disk and communication. A line marked `bad` says what would stop a job, and what to do; the exit
code is then 1. With --peer, check instead what lies between two hosts: both directions, the ports of the rendezvous and
of gloo and NCCL, versions, clocks, whether DIR is the same storage, latency and bandwidth."""
EXAMPLES = """
  longreach doctor
  longreach doctor /shared/runs --peer node1:29500    # the same line on both hosts, of which node1 is one"""
WAIT_SECONDS = 300.0  # for the other host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach doctor``."""
    directory_help = "directory where runs will be written (default: the current one)"
    parser.add_argument("directory", metavar="DIR", nargs="?", help=directory_help)
    parser.add_argument("--json", metavar="FILE", help="also append the findings to a file, as one line of JSON")
    peer_help = "check what lies between two hosts: give the same line on both, where HOST is one of them, or name on "
    peer_help += "each the other; PORT is that of the rendezvous (default 29500)"
    parser.add_argument("--peer", metavar="HOST[:PORT]", help=peer_help)
    wait_help = f"with --peer: seconds to wait for the other host (default {WAIT_SECONDS:g})"
    parser.add_argument("--wait", type=float, metavar="SECONDS", help=wait_help)


def run(arguments: argparse.Namespace) -> int:
    """Print what every check finds; returns the exit code: 1 if a job would not run here."""
    from ..doctor.checks import findings_of_all
    from ..doctor.peer import findings_between

    if arguments.wait is not None and not (arguments.peer and arguments.wait > 0):
        raise InputError("--wait", arguments.wait, "seconds above 0, with --peer")
    if arguments.peer:
        checks = findings_between(arguments.peer, arguments.directory, arguments.wait or WAIT_SECONDS)
    else:
        checks = findings_of_all(arguments.directory or ".")
    findings = []
    for finding in checks:
        findings.append(finding)
        print(f"{finding.level:<5} {finding.topic:<12} {finding.text}", flush=True)
    bad = sum(finding.level == "bad" for finding in findings)
    where = "on these two hosts" if arguments.peer else "here"
    print(f"a job runs {where}" if not bad else f"lines marked bad: {bad}; a job would not run {where}")
    if arguments.json:
        append_json(arguments.json, {"bad": bad, "findings": [asdict(finding) for finding in findings]})
    return 1 if bad else 0


def append_json(file_name: str, result: dict[str, Any]) -> None:
    """Append one line to a file: host, time (UTC), version and ``result``.

    Raises:
        InputError: the file cannot be written.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"host": socket.gethostname(), "time": now, "longreach": __version__, **result})
    try:
        with open(file_name, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise InputError("--json", file_name, f"cannot be written: {error.strerror}") from None
