"""Every few steps: are weights that several ranks hold still the same on all of them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bharat.strategies.hybrid import HybridStrategy
from lightning_bharat.strategies.replicas import Difference, Held, Replicas, held_by, held_whole

SHOWN = 4  # names in a message


class ReplicaError(RuntimeError):
    """Ranks that should hold the same do not; the message names the tensor and the rank."""


class ReplicaCheck(pl.Callback):
    """Compares what several ranks hold the same of, bit for bit: weights that are whole on tensor ranks, copies of
    hybrid sharding, a tied embedding and head on two pipeline stages; states of their optimizers; buffers in
    checkpoints. Also under DDP, where each rank holds all.

    A check reads these tensors once on each rank and sends two numbers for each group of ranks. It looks after each
    ``every_n_train_steps`` optimizer steps, and when training ends; before a ``ModelCheckpoint`` of the same step is
    written.

    Args:
        every_n_train_steps: from one check to the next, optimizer steps.

    Raises:
        ValueError: ``every_n_train_steps`` is not a whole number from 1 up.
        MisconfigurationException: under a strategy that places weights in its own way.
        ReplicaError: in training, on all ranks with the same words: what differs, and which rank is apart from the
            majority, where there is one.
    """

    def __init__(self, every_n_train_steps: int = 100) -> None:
        if isinstance(every_n_train_steps, bool) or not isinstance(every_n_train_steps, int) or every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps!r}: write a whole number from 1 up")
        self.every_n_train_steps = every_n_train_steps
        self._replicas: Replicas | None = None
        self._checked = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        is_ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        if trainer.world_size > 1 and not (is_ddp or isinstance(strategy, HybridStrategy)):
            raise MisconfigurationException(
                f"ReplicaCheck does not know which ranks hold the same under {type(strategy).__name__}; "
                'write strategy="bharat_hybrid" or "ddp"'
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._checked = trainer.global_step
        self._replicas = Replicas(_held(trainer), trainer.strategy.root_device) if trainer.world_size > 1 else None
        if self._replicas is None or not self._replicas.exist:
            rank_zero_warn(
                "ReplicaCheck has nothing to compare: each tensor is on one rank only. There are copies with "
                "tensor_parallel_size or replicate_size of 2 or more, and of a tied embedding under a pipeline"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step - self._checked >= self.every_n_train_steps:
            self._check(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._checked:
            self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        before, self._checked = self._checked, trainer.global_step
        if self._replicas is None:
            return
        if found := self._replicas.compare(_held(trainer)):
            strategy = trainer.strategy
            name = strategy.layout.name if isinstance(strategy, HybridStrategy) else "rank {}".format
            raise ReplicaError(_words(found, name, before, self._checked))


def _held(trainer: pl.Trainer) -> Iterator[Held]:
    if isinstance(trainer.strategy, HybridStrategy):
        return held_by(trainer.strategy)
    return held_whole(trainer.lightning_module, trainer.optimizers)


def _words(found: Sequence[Difference], name: Callable[[int], str], before: int, now: int) -> str:
    first, *others = found
    rest = [rank for rank in first.ranks if rank not in first.odd]
    if first.odd:
        what = f"{_listed(first.odd, name)} has another {first.name} than {_listed(rest, name)}"
    else:
        what = f"{first.name} is not the same on {_listed(rest, name)}, and no value is that of most of them"
    more = f" ({len(others)} more differ: {_first([other.name for other in others])})" if others else ""
    return (
        f"after step {now}, {what}{more}. They were the same at step {before}. Since then a bit has changed in a "
        "device's memory or on a link, or code of one rank has changed a value (a hook or callback that asks for its "
        "rank, or draws random numbers of its own; for a buffer: one that each rank changes by its own rows). Go on by "
        f"a checkpoint of step {before} or before (ckpt_path=...); leave out the device of a rank that is named again"
    )


def _listed(ranks: Sequence[int], name: Callable[[int], str]) -> str:
    return _first([name(rank) for rank in ranks])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
