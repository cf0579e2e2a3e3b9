"""Whether what is certain of a model's memory fits the ranks of the smallest host, before any weight is placed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_bharat.plan.layout import LayoutError
from lightning_bharat.plan.memory import memory_per_rank
from lightning_bharat.strategies.memory import device_bytes

if TYPE_CHECKING:
    from lightning_bharat.strategies.hybrid import HybridStrategy


def check_memory(strategy: HybridStrategy, module: pl.LightningModule, units: Iterable[str]) -> None:
    """All ranks must call it.

    Counted are weights, and in ``fit`` their gradients, as the planner does; not activations, and not the states of
    optimizers, which are not known yet. A rank has its device, or its share of what the host's processes may hold.

    Args:
        units: names of the blocks.

    Raises:
        LayoutError: on all ranks with the same words: it can't fit on the host that has least.
    """
    mine = (device_bytes(strategy.root_device, strategy.num_processes), os.uname().nodename)
    every = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    least, name = min(every)
    layout = strategy.layout
    on_device = strategy.root_device.type != "cpu" and strategy.options.offload
    found = memory_per_rank(module, units, layout.data // layout.replicate, {})
    trains = module.trainer.state.fn == "fit"
    # An even division: the fullest rank holds no less.
    needs = (found.parameters + found.gradients * trains) // (layout.tensor * layout.pipeline * layout.expert)
    if needs > least and not on_device:
        what = "weights and gradients" if trains else "weights"
        raise LayoutError(
            f"{name} has {least / 1e9:.3g} GB for each of its ranks, and {layout} needs {needs / 1e9:.3g} GB of each "
            f"for {what} alone; write a larger tensor_parallel_size or pipeline_parallel_size, add devices, or leave "
            f"{name} out"
        )
