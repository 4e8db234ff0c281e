"""torchrun's c10d rendezvous on hosts whose clocks are apart."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any


def ignore_clocks() -> None:
    """From here on, torchrun takes a node for dead by when its last sign of life arrived here.

    Otherwise it goes by the time that the node wrote into it, and removes one whose clock is 15 seconds behind.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    holder: Any = dynamic_rendezvous._BackendRendezvousStateHolder
    remove_dead, arrived = holder._sanitize, dict[Any, tuple[datetime, datetime]]()

    def remove_silent(self: Any) -> None:
        written, now = self._state.last_heartbeats, datetime.now(timezone.utc)
        for node, time in written.items():
            if arrived.get(node, (None,))[0] != time:
                arrived[node] = time, now
        self._state.last_heartbeats = {node: arrived[node][1] for node in written}
        remove_dead(self)
        self._state.last_heartbeats = {node: written[node] for node in self._state.last_heartbeats}

    holder._sanitize = remove_silent
