"""States of torchmetrics in a checkpoint: those of all data ranks together, which one of them takes up again.

Each data rank has seen its own rows. What one rank's ``state_dict`` says is a part, and all ranks that took up the same
saved state would count it several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch import nn
from torchmetrics import Metric

from lightning_bharat.strategies import _torchmetrics


@contextmanager
def of_all_ranks(module: nn.Module) -> Iterator[None]:
    """In here the metrics of ``module`` whose states are saved have those of all data ranks. All ranks must call it."""
    with ExitStack() as stack:
        if dist.is_initialized():
            for metric in _saved(module):
                stack.enter_context(metric.sync_context(dist_sync_fn=metric.dist_sync_fn))
                _torchmetrics.keep_lists(metric)
        yield


def save_all(module: nn.Module) -> Callable[[], None]:
    """Let checkpoints have the states of all metrics of ``module``; returns what makes it as it was."""
    return _torchmetrics.save_all(part for part in module.modules() if isinstance(part, Metric))


def leave_to_another_rank(module: nn.Module) -> None:
    """Begin anew with the metrics of ``module`` whose states are saved: another data rank has taken them up."""
    for metric in _saved(module):
        _torchmetrics.forget(metric)


def _saved(module: nn.Module) -> list[Metric]:
    metrics = (part for part in module.modules() if isinstance(part, Metric))
    return [metric for metric in metrics if metric.sync_on_compute and metric.state_dict()]
