"""What Lightning's callbacks need on a module that is cut over ranks, and which of them can't work there."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

OURS = "lightning_bharat.callbacks"


def refuse_callbacks(trainer: pl.Trainer, devices: int) -> None:
    """Raise for callbacks that would go wrong, before any of them is set up.

    Raises:
        MisconfigurationException: names the callback and what to write instead; the same on all ranks.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        why = _refused(callback, devices)
        if why:
            raise MisconfigurationException(f"{type(callback).__name__} under bharat_hybrid {why}")


def _refused(callback: Callback, devices: int) -> str:
    name = type(callback).__name__
    if isinstance(callback, WeightAveraging):
        copies = "averages a copy of the whole module, and ranks hold pieces of it; "
        if type(callback) in (WeightAveraging, EMAWeightAveraging):
            return f"{copies}use {OURS}.{name}, which has the same arguments and averages each rank's pieces"
        return f"{copies}derive {name} from {OURS}.WeightAveraging, whose hooks are the same"
    if isinstance(callback, StochasticWeightAveraging):
        return (
            "averages a copy of the whole module, and ranks hold pieces of it; use "
            f"{OURS}.WeightAveraging, whose should_update says when to average, and torch.optim.swa_utils.SWALR as the "
            "scheduler"
        )
    if isinstance(callback, ModelPruning) and devices > 1:
        return (
            f"puts masks on weights that are cut over {devices} ranks, and each rank would choose by its own pieces; "
            "train without it, export the checkpoint, and prune it on one device"
        )
    if isinstance(callback, BatchSizeFinder):
        return (
            "waits for one rank to run out of memory, which ends the others; find the size with "
            'Trainer(devices=1, strategy="auto") on a model that fits, or by the bytes that `bharat layout` prints'
        )
    return ""


def resume_callbacks(module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Let callbacks act on the state that they have read from a checkpoint, before the optimizers read theirs.

    Those that do so in ``on_fit_start`` were called too early: a cut module's checkpoint is read after it. A timer may
    have run out; finetuning callbacks have added parameter groups, whose parameters train (with Lightning what had been
    thawed stays frozen).
    """
    trainer = module.trainer
    made = [len(optimizer.param_groups) for optimizer in optimizers]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            BaseFinetuning.on_fit_start(callback, trainer, module)
        elif isinstance(callback, Timer):
            Timer.on_fit_start(callback, trainer)
    added = [g for count, o in zip(made, optimizers, strict=True) for g in o.param_groups[count:]]
    thawed = {id(parameter) for group in added for parameter in group["params"]}
    for part in module.modules():
        own = [parameter for parameter in part.parameters(recurse=False) if id(parameter) in thawed]
        for parameter in own:
            parameter.requires_grad_(True)
        if own and isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):  # freezing had stopped it
            part.track_running_stats = True
