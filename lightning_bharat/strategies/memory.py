"""How many tensor ranks a model needs to fit, by what is certain about its memory."""

from __future__ import annotations

import os

import torch
from torch import nn

from lightning_bharat.strategies.data import find_units

USABLE = 0.7  # of a device's memory; the rest is for activations, buffers of collectives and fragments


def device_bytes(device: torch.device, ranks_here: int) -> int:
    """Memory of one rank: of its device, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(ranks_here, 1)


def static_bytes(module: nn.Module, data: int, tensor: int) -> int:
    """What one rank holds between and in steps, activations apart: its share of parameters, gradients and two optimizer
    states, and what is gathered at once (the largest block and everything outside of blocks)."""
    units = [module.get_submodule(name) for name in find_units(module)]
    everything, trained = _bytes(module), _bytes(module, trained=True)
    in_units = [_bytes(unit) for unit in units]
    at_once = everything - sum(in_units) + 2 * max(in_units, default=0)
    share = (everything + 3 * trained) // (data * tensor)
    return share + (2 * at_once // tensor if data > 1 else 0)


def _bytes(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained)


def fitting_tensor_size(module: nn.Module, devices: int, devices_on_host: int, memory: int) -> tuple[int, str]:
    """The smallest tensor size that divides the devices of a host with which the model fits; and the reason, in words."""  # noqa: E501
    sizes = [n for n in range(1, devices_on_host + 1) if devices_on_host % n == 0 and devices % n == 0]
    needs = {n: static_bytes(module, devices // n, n) for n in sizes}
    for size in sizes:
        if needs[size] <= USABLE * memory:
            break
    words = f"{needs[size] / 2**30:.2f} GiB a rank of {memory / 2**30:.2f} GiB, activations apart"
    return size, words if needs[size] <= USABLE * memory else f"{words}: it may not fit"
