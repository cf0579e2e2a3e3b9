"""What one host of a run has, as the launchers tell each other."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lightning_bharat.plan import host
from lightning_bharat.plan.cluster import Link


@dataclass(frozen=True)
class Node:
    """A host.

    Attributes:
        name: of the host.
        ranks: that run on it.
        cores: that its ranks may use.
        memory: bytes that its processes may hold together.
        available: bytes of it that are free.
        devices: CUDA devices.
        device: their name; empty: none.
        device_memory: bytes of the smallest.
        folder: of the run.
        disk: bytes that are free there.
        link: to the next host, the last one's to the first, as measured; ``None``: there is no other, or it could not
            be.
    """

    name: str
    ranks: int
    cores: float
    memory: int
    available: int
    devices: int = 0
    device: str = ""
    device_memory: int = 0
    folder: str = ""
    disk: int = 0
    link: Link | None = None

    @classmethod
    def read(cls, ranks: int, folder: Path) -> Node:
        """This host, with so many ranks, and a run in ``folder``, which need not be there yet."""
        there = folder.absolute()
        while not there.is_dir() and there.parent != there:
            there = there.parent
        memory = host.memory()
        cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return cls(
            name=os.uname().nodename,
            ranks=ranks,
            cores=host.cores(),
            memory=memory,
            available=min(memory, psutil.virtual_memory().available),
            devices=len(cuda),
            device=cuda[0].name if cuda else "",
            device_memory=min((device.total_memory for device in cuda), default=0),
            folder=str(folder),
            disk=psutil.disk_usage(str(there)).free,
        )

    def facts(self) -> dict[str, Any]:
        """For the record of the run."""
        return {name: getattr(self, name) for name in ("cores", "memory", "available", "devices", "device", "disk")}

    @property
    def bytes_per_rank(self) -> int:
        """Of its device, or its share of the host's memory."""
        return self.device_memory if self.devices else self.memory // max(self.ranks, 1)


def to_text(nodes: list[Node]) -> str:
    """As JSON."""
    return json.dumps([asdict(node) for node in nodes])


def from_text(text: str) -> list[Node]:
    """Back from JSON.

    Raises:
        ValueError: it is no such text.
    """
    try:
        return [_node(fields) for fields in json.loads(text)]
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"no description of nodes: {error}") from None


def _node(fields: dict[str, Any]) -> Node:
    link = fields.pop("link", None)
    return Node(**fields, link=Link(**link) if link else None)
