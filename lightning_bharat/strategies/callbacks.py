"""Which of Lightning's callbacks can't work on a module that is cut over ranks, and what to write instead."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

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
