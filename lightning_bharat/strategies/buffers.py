"""Buffers that training changes: the same on all data ranks, since evaluation reads them and a checkpoint keeps one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_bharat.strategies._torch import persistent_buffers


class BuffersError(ValueError):
    """A buffer that each data rank has changed by its own rows; the message says what to write."""


def compare_buffers(module: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare what a checkpoint keeps of the buffers of ``module`` over the data ranks. All of ``group`` must call it.

    Raises:
        BuffersError: on all of these ranks, with the name of a buffer that differs.
    """
    digests = {name: _digest(buffer) for name, buffer in kept_buffers(module)}
    if not digests:  # nor has another rank any
        return
    mine = xxhash.xxh3_64(repr(digests).encode()).intdigest() >> 1
    pair = torch.tensor([mine, -mine], device=device)
    dist.all_reduce(pair, dist.ReduceOp.MAX, group=group)
    if pair[0] == -pair[1]:
        return
    everyone: list[dict[str, int]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, digests, group=group)
    for name, first in everyone[0].items():
        if any(others.get(name, first) != first for others in everyone):
            raise BuffersError(
                f"buffer {name} is not the same on all data ranks: each has changed it by its own rows. Where it is "
                "changed, take the mean over ranks (self.trainer.strategy.reduce(value) in the LightningModule), or "
                "keep it out of checkpoints by register_buffer(..., persistent=False) if its value does not matter"
            )


def kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of ``module`` that checkpoints keep, but those of metrics: each rank counts its own rows in them."""
    kept = list(persistent_buffers(module))
    metrics = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, Metric)) if kept else ()
    for name, buffer in kept:
        if not name.startswith(metrics) and not buffer.is_meta:
            yield name, buffer


def _digest(buffer: Tensor) -> int:
    flat = buffer.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_64(flat.view(torch.uint8).numpy().data if flat.numel() else b"").intdigest()
