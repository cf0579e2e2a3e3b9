"""What replica groups that may die can't do, or what has not been proven: refused in words before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parameter import is_lazy

from lightning_bharat.strategies.placed import has_known_order
from lightning_bharat.strategies.replica_groups import ReplicaError

PRECISIONS = ("32-true", "64-true")
_DECIDE = (
    *(BaseFinetuning, BatchSizeFinder, EarlyStopping, GradientAccumulationScheduler),
    *(LearningRateFinder, ModelPruning, StochasticWeightAveraging, WeightAveraging),
)


def check_arguments(replica: int, replicas: int, lighthouse: str, timeout: timedelta) -> None:
    """Refuse arguments that make no replica group.

    Raises:
        ReplicaError: names the argument and what to write.
    """
    if type(replicas) is not int or replicas < 1:
        raise ReplicaError(f"replicas={replicas!r}: write how many groups share the samples, from 1 up")
    if type(replica) is not int or not 0 <= replica < replicas:
        raise ReplicaError(f"replica={replica!r} of {replicas} groups: write a number from 0 to {replicas - 1}")
    if not isinstance(lighthouse, str) or not lighthouse.startswith(("http://", "https://")):
        raise ReplicaError(
            f"lighthouse={lighthouse!r}: start `torchft_lighthouse --min_replicas 1` and write its address, such as "
            'lighthouse="http://host:29510", or set TORCHFT_LIGHTHOUSE'
        )
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        raise ReplicaError(f"timeout={timeout!r}: write a datetime.timedelta above 0")


def refuse(trainer: pl.Trainer, module: pl.LightningModule, device: torch.device, ranks: int, devices: int) -> None:
    """Refuse a run that groups would not train as one process does.

    Args:
        ranks: of the launcher that has started this process.

    Raises:
        ReplicaError: names the first thing, and what to write instead.
    """
    problems = _of_start(device, ranks, devices)
    if trainer.state.fn == TrainerFn.FITTING:
        problems = chain(problems, _of_trainer(trainer), _of_module(module))
    for problem in problems:
        raise ReplicaError(f"bharat_torchft: {problem}")


def refuse_optimizers(optimizers: Sequence[Any], schedulers: Sequence[Any]) -> None:
    """Refuse optimizers whose step is no function of one gradient, and schedulers that look at what a group logs.

    Raises:
        ReplicaError: names the class, and what to write instead.
    """
    if isinstance(optimizers[0], torch.optim.LBFGS):
        raise ReplicaError("bharat_torchft: LBFGS asks for several gradients in one step; use another optimizer")
    for config in schedulers:
        if config.reduce_on_plateau:
            raise ReplicaError(
                f"bharat_torchft: {type(config.scheduler).__name__} looks at what each group logs by itself, so that "
                "learning rates would differ; use a scheduler that counts steps or epochs"
            )


def refuse_loaders(loaders: Sequence[Any]) -> None:
    """Refuse training data in which a group that joins can't find its place.

    Raises:
        ReplicaError: names the loader's class, and what to write instead.
    """
    if len(loaders) != 1 or not has_known_order(loaders[0]):
        names = ", ".join(type(loader).__name__ for loader in loaders)
        raise ReplicaError(
            f"bharat_torchft: a group that joins can't find its place in the training data ({names}); return one torch "
            "DataLoader over a dataset with a length, with shuffle=True or False and without a sampler of your own"
        )


def _of_start(device: torch.device, ranks: int, devices: int) -> Iterator[str]:
    if ranks != 1 or devices != 1:
        yield (
            f"a replica group is one process with one device, and this one has {devices} devices and is one of {ranks} "
            "ranks; write Trainer(devices=1) and start each group by itself, without torchrun"
        )
    if device.type != "cpu":
        yield f'it has been proven on the CPU alone, and the device is {device}; write Trainer(accelerator="cpu")'


def _of_trainer(trainer: pl.Trainer) -> Iterator[str]:
    if trainer.precision not in PRECISIONS:
        yield f"precision={trainer.precision!r} has not been proven here; write one of {', '.join(PRECISIONS)}"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        yield "reload_dataloaders_every_n_epochs: a group that joins would not have the others' loader; leave it out"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _DECIDE):
            yield (
                f"{type(callback).__name__} changes training by what it has seen in this process, which a group that "
                "joins has not; leave it out"
            )


def _of_module(module: pl.LightningModule) -> Iterator[str]:
    if not module.automatic_optimization:
        yield "manual optimization: a step that was lost could not be left out; leave automatic_optimization at True"
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            yield f"parameter {name} has no shape yet: call the lazy module once, on zeros, where you build it"
        elif parameter.is_complex() or parameter.layout != torch.strided:
            yield f"parameter {name} is {parameter.dtype} ({parameter.layout}); gradients of real numbers are averaged"
    for name, part in module.named_modules():
        if getattr(part, "sparse", False) is True:
            yield f"{name} ({type(part).__name__}) has sparse gradients; write sparse=False"
