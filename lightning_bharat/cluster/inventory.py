"""What the hosts of a run have: told by each launcher to all when they meet, looked at before ranks start, and left in
a variable of the ranks, from which a layout is planned."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_bharat.cluster.link_speed import SpeedServer, measure
from lightning_bharat.cluster.node import Node, from_text, to_text
from lightning_bharat.plan.cluster import Cluster, ClusterError

VARIABLE = "BHARAT_NODES"


def exchange(store: Any, here: int, size: int, address: str, mine: Node) -> list[Node]:
    """All hosts, in order, with the link from each to the next, which all measure at the same time: as in a ring.

    Args:
        store: of the rendezvous; each of ``size`` launchers calls this with the same.
        here: this host's number.
        address: where others reach it.
        mine: what it has.

    Raises:
        torch.distributed.DistStoreError: a host was lost meanwhile.
    """
    if size == 1:
        return [mine]
    with SpeedServer() as server:
        store.set(f"bharat/speed/{here}", f"{server.port} {address}")
        port, _, there = store.get(f"bharat/speed/{(here + 1) % size}").decode().partition(" ")
        store.set(f"bharat/node/{here}", to_text([replace(mine, link=measure(there, int(port)))]))
        return [from_text(store.get(f"bharat/node/{rank}").decode())[0] for rank in range(size)]


def here() -> list[Node]:
    """The hosts of the run that this process is a rank of, as its launcher has told; none outside of ``bharat
    launch``."""
    text = os.environ.get(VARIABLE, "")
    return from_text(text) if text else []


def warnings(nodes: Sequence[Node]) -> Iterator[str]:
    """What is wrong with the hosts of a run, or may be, in words."""
    for node in nodes:
        if node.cores < node.ranks:
            yield f"{node.name} has {node.cores:g} cores for {node.ranks} ranks, which will wait for each other"
        if 0 < node.devices < node.ranks:
            yield f"{node.name} has {node.devices} CUDA devices for {node.ranks} ranks"
        if len(nodes) > 1 and node.link is None:
            yield f"the link from {node.name} to the next host could not be measured: a firewall may be between them"
    if len({node.bytes_per_rank for node in nodes}) > 1:
        least = min(nodes, key=lambda node: node.bytes_per_rank)
        yield (
            f"hosts differ in memory, and ranks hold alike: {least.name} counts, with {least.bytes_per_rank / 1e9:.4g} "
            "GB a rank"
        )


def on_nodes(detected: Cluster, nodes: Sequence[Node]) -> Cluster:
    """``detected``, which is one of ``nodes``, as all of them: with the least memory, and the slowest link.

    Raises:
        ClusterError: hosts have different numbers of ranks, or no link between them could be measured.
    """
    least = min(nodes, key=lambda node: node.bytes_per_rank)
    other = next((node for node in nodes if node.ranks != nodes[0].ranks), None)
    if other is not None:
        raise ClusterError(
            f"{nodes[0].name} runs {nodes[0].ranks} ranks, and {other.name} {other.ranks}: the planner knows equal "
            "hosts; write the same --nproc-per-node on all, or the sizes, as in --layout data=3"
        )
    links = [node.link for node in nodes if node.link is not None]
    slowest = min(links, key=lambda link: link.bandwidth) if len(links) == len(nodes) else None
    words = [f"Devices of {len(nodes)} hosts: the memory is that of {least.name}, the smallest."] if nodes[1:] else []
    if slowest and nodes[1:]:
        speed = f"{slowest.bandwidth / 1e9:.3g} GB/s, {slowest.latency * 1e6:.3g} µs"
        words.append(f"Link between hosts as measured when they met: {speed}.")
    merged = replace(
        detected,
        memory=least.bytes_per_rank,
        inter_node=slowest or detected.inter_node,
        notes=(*detected.notes, *words),
    )
    return merged.of(len(nodes), nodes[0].ranks)
