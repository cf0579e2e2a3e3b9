"""The machines that a layout is planned for: written down in YAML, or looked at."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_bharat.plan import host
from lightning_bharat.plan.layout import LayoutError

EXAMPLE = """\
nodes: 4
devices_per_node: 8
memory: 80 GB              # of a device; a list of those that differ: the smallest counts
flops: 312 TFLOP/s         # of a device, in the precision of the run
efficiency: 0.5            # the share of it that matrix products reach
intra_node: {bandwidth: 300 GB/s, latency: 5 us}    # of a device, to those of its node
inter_node: {bandwidth: 100 GB/s, latency: 10 us}   # of a node, all its devices together
host: {memory: 1 TB, bandwidth: 25 GB/s}            # of a node, and of a device's link to it; left out: no offload
usable: 0.9                # the share of memory to plan with
overlap: true              # data ranks exchange while they compute: GPUs do, over gloo they wait
"""
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}
_BYTES = {f"{p}B": n for p, n in (_PREFIXES | _BINARY).items()}
UNITS = {
    "bytes": _BYTES,
    "bytes/s": {f"{u}/s": n for u, n in _BYTES.items()} | {f"{p}bit/s": n / 8 for p, n in _PREFIXES.items()},
    "FLOP/s": {f"{p}FLOP/s": n for p, n in _PREFIXES.items()},
    "s": {f"{p}s": n for p, n in _SMALL.items()},
}


class ClusterError(LayoutError):
    """A description of machines that can't be; the message names the entry and says what to write."""


@dataclass(frozen=True)
class Link:
    """A link between devices, by the time that a message takes: ``latency`` + bytes / ``bandwidth``.

    Attributes:
        bandwidth: bytes a second, one way.
        latency: seconds.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Host:
    """Memory of a node in bytes, and bytes a second between a device and it."""

    memory: int
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices.

    Attributes:
        nodes, devices_per_node: how many.
        memory: bytes of a device.
        flops: floating-point operations a second of a device, at most.
        efficiency: the share of ``flops`` that a model's matrix products reach.
        intra_node: between devices of a node, for each device.
        inter_node: between nodes, for all devices of a node together; ``None`` for a single node.
        host: where parameters, gradients and optimizer states can be offloaded to; ``None``: nowhere.
        usable: the share of ``memory`` to plan with; the rest is for the libraries' own needs and fragments.
        overlap: data ranks exchange while they compute, as GPUs do; over gloo they wait.
        notes: what was assumed, in words.

    Raises:
        ClusterError: a number that is not positive, or several nodes without a link between them.
    """

    nodes: int
    devices_per_node: int
    memory: int
    flops: float
    intra_node: Link
    inter_node: Link | None = None
    host: Host | None = None
    efficiency: float = 0.5
    usable: float = 0.9
    overlap: bool = True
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("nodes", "devices_per_node", "memory", "flops"):
            if not getattr(self, name) > 0:
                raise ClusterError(f"cluster: {name}={getattr(self, name)}: write a number above 0")
        for name in ("efficiency", "usable"):
            if not 0 < getattr(self, name) <= 1:
                raise ClusterError(f"cluster: {name}={getattr(self, name)}: write a share above 0, up to 1")
        for name in ("intra_node", "inter_node"):
            link = getattr(self, name)
            if link is not None and not (link.bandwidth > 0 and link.latency >= 0):
                raise ClusterError(f"cluster: {name}: a bandwidth is above 0, a latency not below")
        if self.host is not None and not (self.host.memory > 0 and self.host.bandwidth > 0):
            raise ClusterError("cluster: host: memory and bandwidth are above 0")
        if self.nodes > 1 and self.inter_node is None:
            raise ClusterError(
                f"cluster: {self.nodes} nodes have no link between them; write "
                "inter_node: {bandwidth: 100 GB/s, latency: 10 us}"
            )

    @property
    def devices(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    @property
    def room(self) -> int:
        """Bytes of a device to plan with."""
        return int(self.memory * self.usable)

    def link(self, ranks: int, stride: int) -> Link:
        """What one of ``ranks`` ranks, ``stride`` apart from each other, sends to the next of them at, while all other
        ranks of the cluster do the same.

        A ring through several nodes leaves each of them once; as many rings as ranks of other groups are on a node
        share its link.
        """
        here = self._here(ranks, stride)
        if here == ranks or self.inter_node is None:
            return self.intra_node
        share = self.inter_node.bandwidth * here / self.devices_per_node
        return Link(min(share, self.intra_node.bandwidth), max(self.inter_node.latency, self.intra_node.latency))

    def _here(self, ranks: int, stride: int) -> int:
        """How many of a group are on a node."""
        return max(1, min(ranks, self.devices_per_node // stride))

    def all_to_all(self, ranks: int, stride: int, bytes: float, messages: float = 1) -> float:
        """Seconds in which each of ``ranks`` ranks, ``stride`` apart, sends each of them an equal part of ``bytes``, in
        ``messages`` goes, while all other ranks of the cluster do the same.

        What stays on a node and what leaves it goes at the same time, and to all at once; all devices of a node leave
        it over one link.
        """
        if ranks == 1:
            return 0.0
        here, part = self._here(ranks, stride), bytes / ranks
        inside = (here - 1) * part / self.intra_node.bandwidth
        if here == ranks or self.inter_node is None:
            return messages * self.intra_node.latency + inside
        outside = (ranks - here) * part * self.devices_per_node / self.inter_node.bandwidth
        return messages * max(self.intra_node.latency, self.inter_node.latency) + max(inside, outside)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Cluster:
        """Read a description in YAML; :data:`EXAMPLE` is one.

        Raises:
            ClusterError: it can't be read, an entry is missing, not known, of another type or unit, or can't be.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ClusterError(f"cluster {path}: {error}") from error
        if not isinstance(data, Mapping):
            raise ClusterError(f"cluster {path}: write names and values, such as\n{EXAMPLE}")
        return cls(**_entries(f"cluster {path}", data, _ENTRIES, ("nodes", "devices_per_node", "memory", "flops")))

    @classmethod
    def detect(cls, kind: str | None = None) -> Cluster:
        """This machine, as one node: its CUDA devices, or its cores, each with its share of the memory.

        Args:
            kind: "cuda" or "cpu"; ``None``: CUDA devices, if there are any.

        FLOP/s are those of a few matrix products, bytes a second those of a few copies: a fraction of a second.
        """
        return _cuda() if kind == "cuda" or (kind is None and torch.cuda.is_available()) else _cores()

    def of(self, nodes: int, devices_per_node: int, share: bool = False) -> Cluster:
        """As many nodes of such devices.

        Args:
            share: whether the devices of a node share its memory, and do not bring their own.

        Raises:
            ClusterError: there are several, and no link between nodes is known.
        """
        if nodes > 1 and self.inter_node is None:
            raise ClusterError(
                f"{nodes} nodes, and no link between nodes is known; write --cluster cluster.yaml with inter_node: "
                "{bandwidth: 100 GB/s, latency: 10 us}"
            )
        memory = self.memory * self.devices_per_node // devices_per_node if share else self.memory
        return replace(self, nodes=nodes, devices_per_node=devices_per_node, memory=memory)

    def __str__(self) -> str:
        many = f"{self.nodes} nodes of {self.devices_per_node} devices" if self.nodes > 1 else f"{self.devices} devices"
        return (
            f"{many}, {self.memory / 1e9:.4g} GB and {self.flops / 1e12:.4g} TFLOP/s each; planned with "
            f"{self.usable:.0%} of the memory and {self.efficiency:.0%} of the FLOP/s"
        )


# ---- reading


def number(text: Any, kind: str) -> float:
    """A quantity such as ``"80 GB"`` or ``"5 us"`` in bytes, bytes/s, FLOP/s or s; a bare number is in that unit.

    Raises:
        ValueError: it is none; says what to write.

    >>> number("80 GB", "bytes"), number("100 Mbit/s", "bytes/s"), number("312 TFLOPS", "FLOP/s"), number(3, "s")
    (80000000000.0, 12500000.0, 312000000000000.0, 3.0)
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    found = (
        re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*", text) if isinstance(text, str) else None
    )
    unit = re.sub(r"FLOPS$", "FLOP/s", found.group(2)) if found else ""
    if found is None or (unit and unit not in UNITS[kind]):
        raise ValueError(f"{text!r}: write a number and a unit, such as {_SUCH_AS[kind]!r}")
    return float(found.group(1)) * (UNITS[kind][unit] if unit else 1.0)


_SUCH_AS = {"bytes": "80 GB", "bytes/s": "300 GB/s", "FLOP/s": "312 TFLOP/s", "s": "5 us"}


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r}: write a whole number")
    return value


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r}: write a share such as 0.5")
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r}: write true or false")
    return value


def _memory(value: Any) -> int:
    """Of the smallest device, if they differ: ranks hold alike."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("[]: write the memory of a device, such as '80 GB'")
    return int(min(number(v, "bytes") for v in values))


def _of(kind: str) -> Callable[[Any], float]:
    return lambda value: number(value, kind)


def _link(value: Any) -> Link:
    return Link(**_entries("", value, {"bandwidth": _of("bytes/s"), "latency": _of("s")}, ("bandwidth", "latency")))


def _host(value: Any) -> Host:
    return Host(**_entries("", value, {"memory": _memory, "bandwidth": _of("bytes/s")}, ("memory", "bandwidth")))


_ENTRIES: dict[str, Callable[[Any], Any]] = {
    "nodes": _count,
    "devices_per_node": _count,
    "memory": _memory,
    "flops": _of("FLOP/s"),
    "intra_node": _link,
    "inter_node": _link,
    "host": _host,
    "efficiency": _share,
    "usable": _share,
    "overlap": _truth,
}


def _entries(where: str, data: Any, known: Mapping[str, Callable[[Any], Any]], needed: tuple[str, ...]) -> dict:
    if not isinstance(data, Mapping):
        raise ValueError(f"{data!r}: write {{{', '.join(f'{name}: ...' for name in known)}}}")
    for name in data:
        if name not in known:
            raise ClusterError(f"{where}: {name!r} is not known; write some of {', '.join(known)}".lstrip(": "))
    for name in needed:
        if name not in data:
            raise ClusterError(f"{where}: {name} is missing".lstrip(": "))
    read: dict[str, Any] = {}
    for name, value in data.items():
        try:
            read[name] = known[name](value)
        except ClusterError as error:
            raise ClusterError(f"{where}: {name}: {error}".lstrip(": ")) from error
        except ValueError as error:
            raise ClusterError(f"{where}: {name}={error}".lstrip(": ")) from error
    if known is _ENTRIES:
        _complete(where, data, read)
    return read


def _complete(where: str, data: Mapping, read: dict[str, Any]) -> None:
    if "intra_node" not in read:
        if read["devices_per_node"] > 1:
            raise ClusterError(f"{where}: intra_node is missing; write {{bandwidth: 300 GB/s, latency: 5 us}}")
        read["intra_node"] = read.get("inter_node", Link(1.0, 0.0))  # between a device and itself nothing goes
    differ = isinstance(data["memory"], list) and len({number(v, "bytes") for v in data["memory"]}) > 1
    if differ:
        said = (
            f"Devices differ in memory, and ranks hold alike: planned for the smallest, {read['memory'] / 1e9:.4g} GB."
        )
        read["notes"] = (said,)


# ---- looking


def _cuda() -> Cluster:
    count = torch.cuda.device_count()
    memory = [torch.cuda.get_device_properties(i).total_memory for i in range(count)]
    device = torch.device("cuda", 0)
    flops = _matrix_products(device, 4096, torch.bfloat16)
    other = torch.device("cuda", 1) if count > 1 else device
    notes = ["FLOP/s are those of products of bfloat16 matrices here, so efficiency is 1."]
    if len(set(memory)) > 1:
        notes.append(f"Devices differ in memory: planned for the smallest, {min(memory) / 1e9:.4g} GB.")
    link = Link(_copies(device, other), 10e-6)
    return Cluster(1, count, min(memory), flops, link, efficiency=1.0, notes=(*notes, _LATENCY.format(10)))


def _cores() -> Cluster:
    cores = max(int(host.cores()), 1)
    memory = host.memory() // cores
    device = torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a rank is a core
    try:
        flops, bandwidth = _matrix_products(device, 512, torch.float32), _copies(device, device)
    finally:
        torch.set_num_threads(threads)
    notes = ("FLOP/s are those of products of float32 matrices on one core, so efficiency is 1.", _LATENCY.format(100))
    return Cluster(1, cores, memory, flops, Link(bandwidth, 100e-6), efficiency=1.0, overlap=False, notes=notes)


_LATENCY = "The latency of a message is taken for {} µs; write a cluster file to say another."


def _matrix_products(device: torch.device, size: int, dtype: torch.dtype) -> float:
    x = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(device, lambda: x @ x)


def _copies(source: torch.device, target: torch.device, size: int = 2**25) -> float:
    x, y = torch.ones(size, dtype=torch.uint8, device=source), torch.ones(size, dtype=torch.uint8, device=target)
    return size / _seconds(target, lambda: y.copy_(x))


def _seconds(device: torch.device, run: Callable[[], Any], times: int = 5) -> float:
    """Of the fastest of a few runs, after one that warms up."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])
