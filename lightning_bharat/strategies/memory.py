"""How many tensor ranks a model needs to fit, by what is certain about its memory."""

from __future__ import annotations

import torch
from torch import nn

from lightning_bharat.plan import host
from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.memory import State, memory_per_rank

USABLE = 0.7  # of a device's memory; the rest is for activations, buffers of collectives and fragments


def device_bytes(device: torch.device, ranks_here: int) -> int:
    """Memory of one rank: of its device, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host.memory() // max(ranks_here, 1)


def static_bytes(module: nn.Module, data: int, tensor: int) -> int:
    """What one rank holds, activations apart, with an optimizer that keeps two states of a parameter (Adam)."""
    states: State = {p: [p, p] for p in module.parameters() if p.requires_grad}
    return memory_per_rank(module, find_units(module), data, states).total // tensor


def fitting_tensor_size(module: nn.Module, devices: int, devices_on_host: int, memory: int) -> tuple[int, str]:
    """The smallest tensor size with which the model fits, of those that divide a host's devices; and why, in words."""
    sizes = [n for n in range(1, devices_on_host + 1) if devices_on_host % n == 0 and devices % n == 0]
    needs = {n: static_bytes(module, devices // n, n) for n in sizes}
    for size in sizes:
        if needs[size] <= USABLE * memory:
            break
    words = f"{needs[size] / 2**30:.2f} GiB a rank of {memory / 2**30:.2f} GiB, activations apart"
    return size, words if needs[size] <= USABLE * memory else f"{words}: it may not fit"
