"""A run that goes on from a checkpoint: where Lightning begins again what the run had begun before it was stopped."""

from __future__ import annotations

from inspect import isgeneratorfunction
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_bharat.strategies import _lightning_loops, _lightning_resume
from lightning_bharat.strategies.placed import end_epoch
from lightning_bharat.strategies.randomness import RandomStates
from lightning_bharat.strategies.unfinished import Unfinished


class GoesOn:
    """Called by Lightning's loops, with or without a checkpoint that was read.

    Args:
        random_states: of the strategy.
        unfinished: of the strategy.
    """

    def __init__(self, trainer: Any, random_states: RandomStates, unfinished: Unfinished, device: torch.device) -> None:
        self._run, self._random, self._unfinished, self._device = trainer, random_states, unfinished, device
        _lightning_resume.follow_loops(trainer, self)

    def loaders_made(self) -> None:
        """Or kept; training loaders are iterated over."""
        self._random.loaders_begun(self._device)

    def epoch_begins(self, batches: int) -> None:
        """Before the first batch, or the one that follows so many batches of a run before."""
        loaders = _lightning_loops.training_loaders(self._run)
        self._random.epoch_goes_on(batches, any(map(_begins_late, loaders)), self._device)
        self._unfinished.epoch_goes_on(self._run, batches)

    def epoch_ended(self) -> None:
        """All of its batches were handed out."""
        for loader in _lightning_loops.training_loaders(self._run):
            end_epoch(loader)

    def validation_begins(self) -> None:
        """Before loaders are iterated over."""
        if not self._run.sanity_checking:  # it leaves random numbers as they are
            self._random.validation_begins(self._device)
            self._unfinished.validation_begins(self._run)


def _begins_late(loader: Any) -> bool:
    """Whether an iteration over ``loader`` begins with its first batch: all but torch's own do, as far as is known."""
    functions = (vars(kind).get("__iter__") for kind in type(loader).__mro__)
    return not isinstance(loader, DataLoader) or any(map(isgeneratorfunction, functions))
