"""Steps that are kept in the memory of hosts, between the checkpoints on disk."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bharat.callbacks.background_checkpoint import BackgroundCheckpoint
from lightning_bharat.checkpoints import host_memory
from lightning_bharat.checkpoints.host_memory import Hosts

NEEDS = (
    "needs bharat launch (which gives ranks a folder in their hosts' memory) and a strategy of this package with "
    "save_distributed_checkpoint=True: nothing is kept in memory"
)


class MemoryCheckpoint(BackgroundCheckpoint):
    """The part of :class:`FaultTolerantCheckpoint` that keeps the newest step in hosts' memory.

    Args:
        args, kwargs: of :class:`BackgroundCheckpoint`.
        memory_every_n_train_steps: as there.
    """

    def __init__(self, *args: Any, memory_every_n_train_steps: int | None = None, **kwargs: Any) -> None:
        every = memory_every_n_train_steps
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"memory_every_n_train_steps={every!r}: write a whole number from 1 up")
        super().__init__(*args, **kwargs)
        self.memory_every_n_train_steps = every
        self._in_memory = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.memory_every_n_train_steps and not self._hosts(trainer):
            rank_zero_warn(f"memory_every_n_train_steps={self.memory_every_n_train_steps} {NEEDS}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._in_memory = trainer.global_step

    def keep_in_memory(self, trainer: pl.Trainer) -> None:
        """Keep this step, if it is one to be kept and nothing is being written. All ranks must call it after a step of
        the optimizer."""
        every, hosts = self.memory_every_n_train_steps, self._hosts(trainer)
        is_due = every and trainer.global_step - self._in_memory >= every
        if is_due and hosts and not self.is_writing and not self.is_saved(trainer):
            self._in_memory = trainer.global_step
            self.write_aside(trainer, hosts.folder / f"step={trainer.global_step}.ckpt")

    def _hosts(self, trainer: pl.Trainer) -> Hosts | None:
        return host_memory.hosts() if self._saves_of(trainer) else None
