"""What a host knows of the endpoint at which the nodes of a job meet: whether it is its own, and the way there."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from dataclasses import dataclass

import psutil

PAUSE = 0.5  # seconds between two attempts to reach the endpoint


class NotReached(Exception):
    """Nobody answered at the endpoint; the message says why, and what to do."""


@dataclass
class Route:
    """The way from this host to the endpoint of a job.

    Attributes:
        leads: whether the endpoint's address is one of its own.
        address: its own, on the way to the endpoint.
        interface: which has that address.
    """

    leads: bool
    address: str
    interface: str


def is_local(host: str) -> bool:
    """Whether all nodes are on this machine: "localhost", or an address of the loopback."""
    return host == "localhost" or _is_loopback(host)


def resolve(host: str, port: int) -> tuple[str, bool]:
    """The address of a name, and whether it is this host's own.

    Raises:
        OSError: the name is not known.
    """
    address = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    return address, _is_loopback(address) or address in interfaces()


def route_to(host: str, port: int, seconds: float) -> Route:
    """Find the way from this host to the endpoint; waits until the endpoint answers, where it is not this host's own.

    Args:
        host: name or address of the endpoint.
        port: its port.
        seconds: how long to wait for its name to be known, and for somebody to listen there.

    Raises:
        NotReached: its name stayed unknown, nobody listened, or its name is one of this machine's loopback and it is
            not clear by which address others reach it.
    """
    deadline, why = time.monotonic() + seconds, ""
    while True:
        try:
            address, leads = resolve(host, port)
            if leads:
                address = _only_address(host, address) if _is_loopback(address) else address
            else:
                with socket.create_connection((address, port), timeout=max(PAUSE, deadline - time.monotonic())) as way:
                    address = way.getsockname()[0]
            return Route(leads, address, interfaces()[address.partition("%")[0]])
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            break
        time.sleep(PAUSE)
    raise NotReached(
        f"nobody answered within {seconds:g} s ({why}), and this host, with {', '.join(interfaces())}, is not {host}: "
        "start the same command on the host that has this address, or give an address of this host"
    )


def interfaces() -> dict[str, str]:
    """The name of the interface by each address of this host, without those of the loopback."""
    return {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address.address)
    }


def _only_address(host: str, loopback: str) -> str:
    """This host's address for others, where its own name stands for ``loopback`` here (as in Debian's /etc/hosts)."""
    known = interfaces()
    usable = [address for address in known if not ipaddress.ip_address(address).is_link_local]
    usable = [address for address in usable if ":" not in address] or usable
    if len(usable) != 1:
        fix = "give --rdzv-endpoint the address by which the other hosts reach this one"
        raise NotReached(f"{host} is {loopback} on this host, which has {', '.join(usable) or 'no other'}: {fix}")
    return usable[0]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def set_interface(name: str) -> None:
    """Let gloo and NCCL take this interface, where the environment names none."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # NCCL takes names without = as prefixes
