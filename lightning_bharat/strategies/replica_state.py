"""What a replica group that joins takes from a live one, so that both take the same next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_bharat.checkpoints.document import as_plain
from lightning_bharat.strategies import _lightning_loops
from lightning_bharat.strategies.placed import go_to


class ReplicaState:
    """Weights and buffers, optimizers, schedulers, and the counters of the trainer's loops, before a step.

    Args:
        schedulers: Lightning's configurations.

    Raises:
        CheckpointError: a part that can't be sent without running code on the other side, by its key.
    """

    def __init__(self, trainer: pl.Trainer, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
        self._run, self._optimizers = trainer, list(optimizers)
        self._schedulers = [config.scheduler for config in schedulers]
        self.give()  # what can't be sent is known now, and not when someone needs it

    @property
    def batches(self) -> int:
        """Of this epoch, that are through."""
        return int(self._loop.epoch_loop.batch_progress.current.ready)

    def give(self) -> dict[str, Any]:
        """A copy, which is sent while training goes on."""
        state = {
            "weights": dict(self._run.lightning_module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
            "loops": self._loops(),
            "stepped": self._loop.epoch_loop.on_save_checkpoint(),
        }
        return as_plain(apply_to_collection(state, Tensor, lambda tensor: tensor.detach().cpu().clone()))

    def take(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` of another group, with the rest of this group's samples of its epoch."""
        self._run.lightning_module.load_state_dict(state["weights"])
        for optimizer, its in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        for scheduler, its in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(its)
        moved = self._place(state["loops"]) != self._place(self._loops())
        for name, progress in self._progress().items():
            progress.load_state_dict(state["loops"][name])
        self._loop.epoch_loop.on_load_checkpoint(state["stepped"])
        if moved:
            self._loop.epoch_loop.restarting = False
            for loader in _lightning_loops.training_loaders(self._run):
                go_to(loader, self._loop.epoch_progress.current.processed, self.batches)
            _lightning_loops.iterate_anew(self._run)

    @property
    def _loop(self) -> Any:
        return self._run.fit_loop

    def _loops(self) -> dict[str, Any]:
        return {name: progress.state_dict() for name, progress in self._progress().items()}

    @staticmethod
    def _place(loops: dict[str, Any]) -> tuple[int, int]:
        return loops["epoch"]["current"]["processed"], loops["batch"]["current"]["ready"]

    def _progress(self) -> dict[str, Any]:
        epoch = self._loop.epoch_loop
        return {
            "epoch": self._loop.epoch_progress,
            "batch": epoch.batch_progress,
            "optimizer": epoch.automatic_optimization.optim_progress,
            "scheduler": epoch.scheduler_progress,
        }
