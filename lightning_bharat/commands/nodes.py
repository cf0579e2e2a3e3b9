"""``bharat launch --check``: what each host of a run has, as a table."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.rendezvous import RendezvousHandler

from lightning_bharat.cluster.inventory import exchange, warnings
from lightning_bharat.cluster.meeting import part
from lightning_bharat.cluster.node import Node
from lightning_bharat.commands.table import size, table

_HEAD = ("host", "ranks", "cores", "memory", "free", "devices", "their memory", "disk free", "to the next", "latency")


def check(meeting: RendezvousHandler, ranks: int, address: str | None, folder: Path) -> int:
    """Of the hosts that meet; each prints all.

    Args:
        ranks: on this host.
        address: of this host; ``None``: that of its name.
        folder: of the run.

    Returns:
        1 if something is wrong.
    """
    met = meeting.next_rendezvous()
    place = met.store, met.rank, met.world_size
    nodes = exchange(*place, address or socket.getfqdn(), Node.read(ranks, folder))
    part(met.store, met.world_size)
    print(nodes_table(nodes), flush=True)
    return int(any(warnings(nodes)))


def nodes_table(nodes: Sequence[Node]) -> str:
    """A line for each host, and what is wrong with them."""
    shown = [_row(node) for node in nodes]
    return "\n".join([table(_HEAD, shown), *(f"! {words}" for words in warnings(nodes))])


def _row(node: Node) -> list[str]:
    numbers = [size(node.memory), size(node.available)]
    devices = [f"{node.devices} × {node.device}", size(node.device_memory)] if node.devices else ["0", "–"]
    link = [f"{size(node.link.bandwidth)}/s", f"{node.link.latency * 1e6:.0f} µs"] if node.link else ["–", "–"]
    return [node.name, str(node.ranks), f"{node.cores:g}", *numbers, *devices, size(node.disk), *link]
