"""torchelastic's rendezvous where there is one host, which meets nobody: no server, no polling, no delay."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo


class OneHost(RendezvousHandler):
    """The rendezvous of a run on this host alone.

    Args:
        run_id: the run's name.
        address: of this host, where its ranks find the store.
    """

    def __init__(self, run_id: str, address: str) -> None:
        self._run_id, self._address = run_id, address
        self._closed = False

    def get_backend(self) -> str:
        return "one-host"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(dist.HashStore(), 0, 1, RendezvousStoreInfo(self._address, 0))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._closed = True
        return True
