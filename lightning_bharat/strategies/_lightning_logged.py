"""Private names of Lightning's logger connector: what an epoch has logged so far, to go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

from lightning_bharat.strategies._torchmetrics import know_of_updates


def share_logged(trainer: pl.Trainer, data: int, data_after: int) -> None:
    """Give each data rank the same part of what all have logged in this epoch so far, so that other data ranks can go
    on with it. All ranks must call it.

    Args:
        data: how many there are.
        data_after: how many go on.
    """
    for metric in trainer.fit_loop.epoch_loop._results.result_metrics:
        meta = metric.meta
        if not (metric.is_tensor and meta.on_epoch and meta.sync.should) or metric.has_reset:
            continue
        metric.value = meta.sync(metric.value.clone())
        if meta.is_mean_reduction:
            metric.value = metric.value * data / data_after
            count = meta.sync(metric.cumulated_batch_size.double())
            metric.cumulated_batch_size = count * data / data_after
        elif meta.is_sum_reduction:
            metric.value = metric.value / data_after
        metric._computed = None


def last_values(trainer: pl.Trainer) -> dict[str, Any]:
    """The values that callbacks and schedulers look at, as they were last."""
    connector = trainer._logger_connector
    return {name: value.detach().cpu().clone() for name, value in connector._callback_metrics.items()}


def put_last_values(trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
    """After Lightning has cleared its own."""
    device = trainer.strategy.root_device
    trainer._logger_connector._callback_metrics.update({name: value.to(device) for name, value in values.items()})


_OF_LOGGED = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx"),
    *("dataloader_idx", "metric_attribute"),
)


def logged(trainer: pl.Trainer) -> dict[str, Any]:
    """What ``self.log`` has added up in this epoch of training, as plain data."""
    found = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        meta, sync = metric.meta, metric.meta.sync
        if metric.has_reset or not meta.on_epoch or sync.group is not None:
            continue
        found[key] = {
            "meta": {name: getattr(meta, name) for name in _OF_LOGGED},
            "reduce": meta.reduce_fx.__name__,
            "sync": {"_should": sync.should, "rank_zero_only": sync.rank_zero_only},
            "states": {name: getattr(metric, name).detach().cpu().clone() for name in _sums(metric)},
        }
    return found


def _sums(metric: Any) -> tuple[str, ...]:
    """A metric of the module that is logged has its states itself."""
    if not metric.is_tensor:
        return ()
    return ("value", "cumulated_batch_size") if metric.meta.is_mean_reduction else ("value",)


def put_logged(trainer: pl.Trainer, saved: Mapping[str, Any]) -> None:
    """Go on adding to it."""
    device, results = trainer.strategy.root_device, trainer.fit_loop.epoch_loop._results
    for key, said in saved.items():
        meta = _Metadata(reduce_fx=getattr(torch, said["reduce"]), **said["meta"])
        meta.sync = _Sync(fn=trainer.strategy.reduce, **said["sync"])
        metric = _ResultMetric(meta, is_tensor=bool(said["states"]))
        if not said["states"]:
            metric.value = trainer.lightning_module.get_submodule(said["meta"]["metric_attribute"])
        for name, value in said["states"].items():
            setattr(metric, name, value)
        know_of_updates(metric, 1)
        results[key] = metric.to(device)
    trainer._logger_connector._first_loop_iter = False  # with the first batch of an epoch it begins anew


def shared_out(of_ranks: list[Mapping[str, Any]], data: int) -> dict[str, Any]:
    """What each of ``data`` ranks goes on with, of what others have logged."""
    found = {}
    for key, first in of_ranks[0].items():
        states, own = {}, [logged[key]["states"] for logged in of_ranks if key in logged]
        for name, value in first["states"].items():
            every = torch.stack([states[name].double() for states in own])
            if first["reduce"] in ("max", "min"):
                value = getattr(every, first["reduce"])(0)
                value = value if isinstance(value, torch.Tensor) else value.values
            else:
                value = every.sum(0) / data
            states[name] = value
        found[key] = {**first, "states": states}
    return {key: said for key, said in found.items() if said["states"]}
