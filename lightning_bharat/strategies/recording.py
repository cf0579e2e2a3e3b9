"""What a step logs in micro-batches, as one value for the batch: recorded on the last stage, logged on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_bharat.strategies.stage_metrics import StageMetrics


class RecordingError(ValueError):
    """Something was logged that can't be put together from micro-batches; the message says what to write."""


@dataclass
class _Entry:
    name: str
    value: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class _Named:
    """Stands for a metric, which each rank has for itself."""

    metric: str


@dataclass
class Logged:
    """What a batch has logged: the entries, and of metrics the numbers of updates and the values on the batch."""

    entries: list[_Entry]
    updates: dict[str, int]
    values: dict[str, Any]


class Recorder:
    """Takes the place of ``module.log`` while micro-batches run."""

    def __init__(self, module: pl.LightningModule, metrics: StageMetrics) -> None:
        self._module, self._metrics = module, metrics
        self._entries: list[list[_Entry]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """One micro-batch."""
        entries: list[_Entry] = []

        def log(name: str, value: Any, *args: Any, **options: Any) -> None:
            options.update(zip(_OPTIONS, args, strict=False))
            entries.append(_Entry(name, self._kept(value), options))

        around = self._module.__dict__.get("log")
        self._module.__dict__["log"] = log
        try:
            yield
        finally:
            del self._module.__dict__["log"]
            if around is not None:
                self._module.__dict__["log"] = around
        self._entries.append(entries)

    def _kept(self, value: Any) -> Any:
        if isinstance(value, Metric):
            return _Named(self._metrics.name(value))
        return value.detach().clone() if isinstance(value, Tensor) else value

    def of_batch(self, weights: Sequence[float], value_of: Callable[[str], Any]) -> Logged:
        """One entry a name; micro-batches weigh ``weights`` in means.

        Args:
            weights: of the micro-batches.
            value_of: a metric's value on the whole batch, by its name.

        Raises:
            RecordingError: micro-batches log other names.
        """
        names = [[entry.name for entry in entries] for entries in self._entries]
        if any(found != names[0] for found in names):
            raise RecordingError(f"micro-batches of one batch log different values: {names[0]} and {names[-1]}")
        entries = [self._merged(list(same), weights) for same in zip(*self._entries, strict=True)]
        metrics = [entry.value.metric for entry in entries if isinstance(entry.value, _Named)]
        return Logged(entries, self._metrics.counts(), {name: value_of(name) for name in metrics})

    def _merged(self, same: list[_Entry], weights: Sequence[float]) -> _Entry:
        first = same[0]
        options = dict(first.options)
        if options.get("batch_size") is not None:
            options["batch_size"] = sum(entry.options["batch_size"] for entry in same)
        if isinstance(first.value, _Named):
            return _Entry(first.name, first.value, options)
        values = torch.stack([torch.as_tensor(e.value, dtype=_wide(e.value)).reshape(()) for e in same])
        return _Entry(first.name, _reduced(values, options.get("reduce_fx", "mean"), weights), options)


def replay(module: pl.LightningModule, logged: Logged, metrics: StageMetrics, device: torch.device) -> None:
    """Log the entries, as the module itself would have."""
    metrics.follow(logged.updates, logged.values)
    for entry in logged.entries:
        value = entry.value.to(device) if isinstance(entry.value, Tensor) else entry.value
        if isinstance(value, _Named):
            value = metrics.metrics[value.metric]
        module.log(entry.name, value, **entry.options)


def _wide(value: Any) -> torch.dtype:
    dtype = value.dtype if isinstance(value, Tensor) else torch.as_tensor(value).dtype
    return dtype if dtype.is_floating_point else torch.float64


def _reduced(values: Tensor, reduce_fx: Any, weights: Sequence[float]) -> Tensor:
    name = getattr(reduce_fx, "__name__", reduce_fx)
    if name in ("mean", "avg"):
        share = torch.tensor(weights, dtype=torch.float64, device=values.device)
        return (values * (share / share.sum()).to(values.dtype)).sum()
    if name in ("sum", "min", "max"):
        return getattr(values, {"sum": "sum", "min": "amin", "max": "amax"}[name])()
    return reduce_fx(values)


_OPTIONS = tuple(signature(pl.LightningModule.log).parameters)[3:]  # after self, name and value
