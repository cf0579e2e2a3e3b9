"""Private names of Lightning: ranks and modules, and what else is no part of a loop.

All that this package touches stand here, in the files beside it (``_lightning_*``) and in ``_model_checkpoint``;
test_private_names.py fails when one moves.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.callbacks import ModelSummary, ThroughputMonitor
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as SubprocessLauncher
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.model_summary import summarize
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_bharat.strategies.attempt_store import store_of_attempt

__all__ = ["NOT_AN_ERROR", "SubprocessLauncher"]

# By these Lightning leaves a trainer on all ranks with nothing being wrong: its tuner is ready.
NOT_AN_ERROR = (_TunerExitException,)


def default_backend(device: torch.device) -> str:
    """``"nccl"`` for CUDA, ``"gloo"`` for the CPU."""
    return _get_default_process_group_backend_for_device(device)


def init_process_group(
    environment: ClusterEnvironment, backend: str, timeout: timedelta | None, device: torch.device
) -> None:
    """Make the process group of all ranks, if there is none."""
    if dist.is_initialized():
        return
    store = store_of_attempt(timeout)
    given: dict[str, Any] = {} if store is None else {"store": store}
    device_id = None if device.type == "cpu" else device
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id, **given)


def set_rank(rank: int) -> None:
    """Tell Lightning's ``rank_zero_only`` functions (in both of its places) who this is."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only as of_lightning

    of_lightning.rank = rank_zero_only.rank = rank  # type: ignore[attr-defined]


def set_device(module: nn.Module, device: torch.device) -> None:
    """Make ``module.device`` say ``device``, without moving anything."""
    _update_properties(module, device=device)


def give_mesh(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """For a ``configure_model`` that was written for Lightning's ``ModelParallelStrategy``."""
    module._device_mesh = mesh


def attach(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Make ``module.trainer`` say ``trainer``, and change nothing in either."""
    module._trainer = trainer


def fits_in_children(trainer: pl.Trainer) -> bool:
    """Whether ``fit`` starts the ranks as children that have the trainer alone (``ddp_fork``, ``ddp_spawn``), not the
    whole script."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def count_by_data_ranks(trainer: pl.Trainer, data: int) -> None:
    """Let ThroughputMonitor multiply by the data ranks: tensor peers see the same samples."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ThroughputMonitor):
            for throughput in callback._throughputs.values():
                throughput.world_size = data


def optimizers_of(module: pl.LightningModule) -> tuple[list[Any], list[Any]]:
    """The optimizers and schedulers that ``configure_optimizers`` of ``module`` makes now."""
    made: Any = module.configure_optimizers()
    if made is None:
        return [], []
    optimizers, schedulers, _ = _configure_optimizers(made)
    return optimizers, [s["scheduler"] if isinstance(s, dict) else s for s in schedulers]


def show_whole_summary(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let ModelSummary show ``module`` as it is now, before it is cut."""
    example = module.example_input_array
    if any(parameter.is_meta for parameter in module.parameters()):
        module.example_input_array = None  # it could not be run
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelSummary) and callback._max_depth:
            whole: Any = _Summary(summarize(module, max_depth=callback._max_depth))
            callback._summary = lambda *_, whole=whole: whole  # type: ignore[method-assign]
    module.example_input_array = example


class _Summary:
    """What a summary says now: Lightning's own looks at the module again each time that it is asked."""

    def __init__(self, summary: Any) -> None:
        self._data = summary._get_summary_data()
        for name in ("total_parameters", "trainable_parameters", "model_size", "total_training_modes", "total_flops"):
            setattr(self, name, getattr(summary, name))

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        return self._data


def materialize_distributed(module: nn.Module, device: torch.device) -> None:
    """Give memory and values to what a module that is already distributed has on ``meta``."""
    _materialize_distributed_module(module, device)
