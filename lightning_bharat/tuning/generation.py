"""One interval of a population's member, as its ranks see it: where it ends, what it leaves, what it goes on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_bharat.tuning.set_again import made_with, set_again

Unit = Literal["epochs", "steps"]


class NotCopied(ValueError):
    """A member can't go on from its donor's checkpoint."""


@dataclass(frozen=True)
class Generation:
    """For the ranks of a trial of a population.

    Attributes:
        end: of it, in epochs or optimizer steps from the member's beginning.
        unit: which of the two.
        checkpoint: where its end is kept.
        begins: the checkpoint that it goes on from; ``None``: it begins anew.
        donor: the trial that left that checkpoint.
        explored: values that differ from the donor's: its and this one's, by key.
    """

    end: int
    unit: Unit
    checkpoint: Path
    begins: Path | None = None
    donor: int | None = None
    explored: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


class GenerationEnd(pl.Callback):
    """Ends a fit at the end of its generation, keeps a checkpoint, and sets explored hyperparameters again.

    The trainer's own ``max_epochs`` or ``max_steps`` stay: a schedule that is made for the whole training stays right.

    Args:
        generation: which one.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._made: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._began = self._saved = False

    def join(self, callbacks: list[pl.Callback]) -> None:
        """Take the place among a trainer's callbacks from which a save is whole.

        At the end of training others (averages of weights) put something else in the place of the weights, so it must
        come first there; after a step it must come last, when the others have seen the step.
        """
        callbacks.insert(0 if self._generation.unit == "epochs" else len(callbacks), self)

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Around the fit: an error while the donor's checkpoint is read names the values that are not the donor's.

        Raises:
            NotCopied: such an error.
        """
        try:
            yield
        except Exception as error:
            own = (
                self._began or not self._generation.explored or isinstance(error, (MemoryError, torch.OutOfMemoryError))
            )
            if own:
                raise
            raise NotCopied(self._why_not(error)) from error

    def _why_not(self, error: Exception) -> str:
        lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()][:2]
        differ = ", ".join(
            f"{key} ({was!r} there, {now!r} here)" for key, (was, now) in self._generation.explored.items()
        )
        return (
            f"the checkpoint of trial {self._generation.donor} does not fit: {' '.join(lines)}. Different from it: "
            f"{differ}. What changes shapes or the kind of optimizer can't be explored, as weights and state are "
            'copied: name those that can in the population\'s "explore"; the others go with the weights'
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Optimizers are as they were made: their state comes from the checkpoint after this."""
        self._made = made_with(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        loop.min_epochs, loop.epoch_loop.min_steps = None, None  # with them Lightning would go on
        if self._before:
            set_again(trainer, self._before, self._made)
        self._began = True
        done = trainer.global_step if self._generation.unit == "steps" else trainer.current_epoch
        if done >= self._generation.end:  # the trial that this one retries was killed behind its last step
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._generation.unit == "steps" and trainer.global_step >= self._generation.end:
            trainer.should_stop = True  # it validates before it stops
            if not self._saved:  # here, since Lightning takes the epoch that is broken off for a whole one
                self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._generation.unit == "epochs" and trainer.current_epoch + 1 >= self._generation.end:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._saved:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = True
        trainer.save_checkpoint(self._generation.checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return self._made

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = dict(state_dict)
