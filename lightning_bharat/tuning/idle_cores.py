"""Cores of workers that have nothing to do, for the most promising of the trials that run.

As Ray Tune's ``DistributeResourcesToTopJob``, but without a restart: a trial asks at each of its validations, and its
ranks take more threads, or give cores back to a trial that needs them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from optuna import Trial
from optuna.study import StudyDirection

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning import current
from lightning_bharat.tuning.slots import Slot

MOST = "most_cores"  # attribute of a trial that has had more than its worker's


def cores_of(trial: Trial, own: Slot, idle: Sequence[Slot], running: Collection[int]) -> tuple[int, ...]:
    """The cores that a trial is to have now.

    Args:
        trial: that asks.
        own: its worker's slot.
        idle: slots in which nothing runs.
        running: numbers of the trials on this host.

    Returns:
        Its slot's, and those of all idle slots if it is ahead of each other trial at the last step that both reported.
    """
    if not idle or not own.cores or not _is_ahead(trial, running):
        return own.cores
    cores = tuple(sorted({core for slot in (own, *idle) for core in slot.cores}))
    if len(cores) > max(len(own.cores), trial.user_attrs.get(MOST, 0)):
        trial.set_user_attr(MOST, len(cores))
    return cores


def _is_ahead(trial: Trial, running: Collection[int]) -> bool:
    sign = -1 if trial.study.direction == StudyDirection.MAXIMIZE else 1
    curves = {
        one.number: {step: sign * value for step, value in one.intermediate_values.items()}
        for one in trial.study.get_trials(deepcopy=False)
        if one.number in running
    }
    mine = curves.pop(trial.number)
    return bool(mine) and all(_beats(mine, trial.number, *other) for other in ((c, n) for n, c in curves.items()))


def _beats(mine: Mapping[int, float], number: int, other: Mapping[int, float], its_number: int) -> bool:
    shared = mine.keys() & other.keys()
    if not shared:
        return not other
    step = max(shared)
    return mine[step] < other[step] or (mine[step] == other[step] and number < its_number)


class IdleCores(pl.Callback):
    """In the ranks of a trial: takes the cores that the controller gives it, after each validation."""

    def __init__(self) -> None:
        self._cores: Sequence[int] = ()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        trial = current.trial()
        assert trial is not None
        cores = trial.cores()
        if cores and cores != self._cores:
            move(cores, trainer.world_size)
        self._cores = cores


def move(cores: Sequence[int], ranks: int) -> None:
    """Let this process's threads run on ``cores``, which it shares with the other ranks of its trial."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)
    torch.set_num_threads(max(1, len(cores) // ranks))


def check(is_config: bool, monitors: Sequence[str], engine: str) -> None:
    """See that trials can ask for the cores of idle workers.

    Raises:
        BadInput: what they are asked for can't be ranked or moved.
    """
    if not is_config:
        raise BadInput("idle_cores is for the trials of a config: an objective sets its threads itself")
    if len(monitors) > 1:
        raise BadInput(f"idle_cores: by {len(monitors)} metrics no trial is the most promising one; leave it out")
    if engine != "warm":
        raise BadInput(f"idle_cores: engine={engine!r} gives workers their cores; leave it out")
    if not (hasattr(os, "sched_setaffinity") and os.path.isdir("/proc/self/task")):
        raise BadInput("idle_cores: on this system a process can't choose its cores; leave it out")
