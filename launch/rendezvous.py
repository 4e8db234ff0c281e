"""torchrun's c10d rendezvous, without its waits for a leading host that has stopped answering.

The calls of its store have no time-out of their own: where a link is cut, they return when TCP gives up, after a
quarter of an hour. Meanwhile torchrun would not see that its ranks have ended.
"""

from __future__ import annotations

import copy
import socket
import time
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, cast

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from ..framework.data.stall import run_in_thread

NAME, C10D = "longreach-c10d", "c10d"
DEFAULT_PORT, JOIN_SECONDS = 29400, 600  # of torchrun's c10d rendezvous
ANSWER_SECONDS = 0.2  # that torchrun waits for an answer while its ranks run
CLOSE_SECONDS = 5.0  # for it to tell the leading host that it ends
STORE_SECONDS = 60.0  # at most, for a call of the store; of torch's, only some have this limit
PROBE_SECONDS = 2.0  # between two attempts to reach the leading host while the nodes meet


class _Store:
    """A store whose calls return or raise in time: by it the launchers wait for each other at the end of a run."""

    def __init__(self, store: Any, seconds: float) -> None:
        self._store, self._seconds = store, seconds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            try:
                return run_in_thread(lambda: found(*arguments)).result(self._seconds)
            except FutureTimeoutError:
                silent = f"another node has not answered for {self._seconds:g} s"
                raise RendezvousConnectionError(silent) from None

        return call if callable(found) else found


class Rendezvous(RendezvousHandler):
    """A rendezvous whose calls return within their time, whether the leading host answers or not.

    Args:
        parameters: of torchrun, for its own backend ``c10d``.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        parameters = copy.copy(parameters)
        parameters.backend = C10D
        self._endpoint = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
        self._seconds = parameters.get_as_int("join_timeout", JOIN_SECONDS) or JOIN_SECONDS
        self._min_nodes = parameters.min_nodes
        self._inner = rendezvous_handler_registry.create_handler(parameters)
        self._asked: Future[int] | None = None

    @property
    def use_agent_store(self) -> bool:
        return self._inner.use_agent_store

    def get_backend(self) -> str:
        return NAME

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes.

        Raises:
            RendezvousConnectionError: the leading host has not answered for ``join_timeout`` seconds.
            RendezvousTimeoutError: too few nodes came within them.
            RendezvousError: as of torchrun's own.
        """
        met, answered = run_in_thread(self._inner.next_rendezvous), time.monotonic()
        while not wait((met,), PROBE_SECONDS).done:
            with suppress(OSError):
                socket.create_connection(self._endpoint, PROBE_SECONDS).close()
                answered = time.monotonic()
            if time.monotonic() - answered > self._seconds and not met.done():
                raise RendezvousConnectionError(f"the leading host has not answered for {self._seconds} s")
        try:
            found: Any = met.result()
        except RendezvousTimeoutError:
            few = f"fewer than {self._min_nodes} nodes came within {self._seconds} s"
            raise RendezvousTimeoutError(few) from None
        store = _Store(found.store, min(STORE_SECONDS, self._seconds))
        return RendezvousInfo(cast(Any, store), found.rank, found.world_size, found.bootstrap_store_info)

    def num_nodes_waiting(self) -> int:
        """How many nodes wait to join; 0 as long as the leading host does not answer.

        Whether the ranks go on without it, they find out: they exchange nothing with torchrun.
        """
        self._asked = self._asked or run_in_thread(self._inner.num_nodes_waiting)
        waiting = 0
        try:
            waiting = self._asked.result(ANSWER_SECONDS)
        except FutureTimeoutError:
            return 0
        except RendezvousError:
            pass
        self._asked = None
        return waiting

    def shutdown(self) -> bool:
        """Tell the other nodes that this one ends; whether they have been told."""
        try:
            return run_in_thread(self._inner.shutdown).result(CLOSE_SECONDS)
        except FutureTimeoutError:
            return False


def use_rendezvous() -> str:
    """Make the backend known to torchrun; returns its name."""
    rendezvous_handler_registry.register(NAME, Rendezvous)
    return NAME
