"""What launchers settle when they have met: the attempt's number, a store of its own, and what each host has."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lightning_bharat.cluster.inventory import exchange
from lightning_bharat.cluster.node import Node

_PATIENCE = 10.0  # seconds for others to leave


@dataclass(frozen=True)
class Meeting:
    """An attempt, as all of its hosts know it.

    Attributes:
        attempt: its number.
        address, port: of its store.
        server: that store, on the host that serves it.
        nodes: the hosts, in order.
    """

    attempt: int
    address: str
    port: int
    server: dist.TCPStore | None
    nodes: list[Node]


def settle(group: Any, attempt: int, mine: Node) -> Meeting:
    """All launchers that have met call it.

    Args:
        group: torchelastic's, after its rendezvous.
        attempt: the number that this host counts; one that came later has counted fewer.
        mine: what this host has.

    Raises:
        torch.distributed.DistStoreError: a host was lost meanwhile.
    """
    store, here, size, server = group.store, group.group_rank, group.group_world_size, None
    address = group.spec.local_addr or socket.getfqdn()
    nodes = exchange(store, here, size, address, mine)
    store.set(f"bharat/attempt/{here}", str(attempt))
    if here == 0:
        counts = [int(store.get(f"bharat/attempt/{rank}")) for rank in range(size)]
        server = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        store.set("bharat/store", json.dumps([address, server.port, max(counts)]))
    address, port, attempt = json.loads(store.get("bharat/store"))
    return Meeting(attempt, address, port, server, nodes)


def part(store: dist.Store, size: int) -> None:
    """Leave a meeting when all have heard what they need: one of them serves the rendezvous."""
    deadline = time.monotonic() + _PATIENCE
    with suppress(dist.DistError):  # it has left already
        store.add("bharat/parted", 1)
        while store.add("bharat/parted", 0) < size and time.monotonic() < deadline:
            time.sleep(0.05)
