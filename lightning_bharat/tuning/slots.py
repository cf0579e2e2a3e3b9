"""Where trials run on this host: each worker has cores and devices of its own, so that trials don't slow each other."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """What one trial at a time has.

    Attributes:
        number: of the worker.
        cores: numbers of CPU cores; empty: not bound to any.
        devices: identifiers for ``CUDA_VISIBLE_DEVICES``; empty: none are given out.
    """

    number: int
    cores: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()

    def environment(self, ranks: int) -> dict[str, str]:
        """Variables of each of ``ranks`` ranks in it."""
        threads = max(1, len(self.cores) // ranks)
        variables = {"OMP_NUM_THREADS": str(threads)}
        return variables | ({"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.devices else {})


def slots(workers: int, devices: list[str] | None = None) -> list[Slot]:
    """Divide this process's cores, and ``devices``, evenly over ``workers``; what is left over is not used.

    With more workers than cores they share all cores.

    Raises:
        ValueError: there are fewer devices than workers.
    """
    cores, devices = sorted(usable_cores()), devices or []
    if devices and len(devices) < workers:
        raise ValueError(
            f"workers={workers} need a device each, and there are {len(devices)}; write workers={len(devices)} or fewer"
        )
    mine = len(cores) // workers
    each = len(devices) // workers
    return [
        Slot(
            number,
            tuple(cores[number * mine : (number + 1) * mine] if mine else cores),
            tuple(devices[number * each : (number + 1) * each]),
        )
        for number in range(workers)
    ]


def cuda_devices() -> list[str]:
    """CUDA devices that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; torch asks NVML, if it can."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def usable_cores() -> set[int]:
    """Numbers of the cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
