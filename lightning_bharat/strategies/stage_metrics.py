"""torchmetrics objects under a pipeline: the last stage updates them, every rank computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_bharat.strategies import _torchmetrics


class MetricError(ValueError):
    """A metric that can't be put together over stages; the message says what to write."""


class StageMetrics:
    """The metrics of ``module``, made to take their states from the last stage when they are computed.

    Args:
        module: on all ranks of the pipeline with the same metrics.
        group: the pipeline's ranks.
        last: the one that has the last stage.

    Raises:
        MetricError: a metric that gathers in each step, which one stage alone would wait in, or in another way than by
            states that are summed or put together.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, last: int) -> None:
        self.metrics = {name: part for name, part in module.named_modules() if isinstance(part, Metric)}
        self._names = {id(metric): name for name, metric in self.metrics.items()}
        self._of_batch: dict[str, Metric] = {}
        for name, metric in self.metrics.items():
            _refuse(name, metric)
            metric.dist_sync_fn = _FromLast(group, last)

    def release(self) -> None:
        """There is no pipeline any more: each rank has its own states."""
        for metric in self.metrics.values():
            metric.dist_sync_fn = None

    def name(self, metric: Metric) -> str:
        """Its name in the module."""
        if id(metric) not in self._names:
            raise MetricError(f"a {type(metric).__name__} is logged that is no attribute of the module; make it one")
        return self._names[id(metric)]

    @contextmanager
    def batch(self) -> Iterator[Callable[[str], Any]]:
        """Micro-batches of one batch; yields a function for a metric's value on the batch as a whole."""
        for metric in self._of_batch.values():
            metric.reset()
        for name, metric in self.metrics.items():
            vars(metric)["forward"] = self._remembering(name, metric.forward)
        try:
            yield self._value
        finally:
            for metric in self.metrics.values():
                del vars(metric)["forward"]

    def _remembering(self, name: str, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name not in self._of_batch:
                self._of_batch[name] = _torchmetrics.of_this_rank(self.metrics[name])
            self._of_batch[name].update(*args, **kwargs)
            return forward(*args, **kwargs)

        return run

    def _value(self, name: str) -> Any:
        return self._of_batch[name].compute() if name in self._of_batch else None

    def counts(self) -> dict[str, int]:
        """How often each metric was updated."""
        return {name: _torchmetrics.updates(metric) for name, metric in self.metrics.items()}

    def follow(self, counts: dict[str, int], values: dict[str, Any]) -> None:
        """On ranks of other stages: know of the updates, and of the values on the last batch."""
        for name, count in counts.items():
            _torchmetrics.know_of_updates(self.metrics[name], count)
        for name, value in values.items():
            _torchmetrics.set_last_value(self.metrics[name], value)


class _FromLast:
    """Gathers a state over data ranks on the last stage, and tells the others."""

    def __init__(self, group: dist.ProcessGroup, last: int) -> None:
        self.group, self.last = group, last

    def __call__(self, state: Tensor, group: Any = None) -> list[Tensor]:
        found: list[Any] = [None]
        if dist.get_rank(self.group) == self.last:
            found = [[part.cpu() for part in gather_all_tensors(state, group)]]
        dist.broadcast_object_list(found, group_src=self.last, group=self.group, device=state.device)
        return [part.to(state.device) for part in found[0]]

    def __deepcopy__(self, memo: dict[int, Any]) -> _FromLast:
        return self  # a process group is not copied


def _refuse(name: str, metric: Metric) -> None:
    if metric.dist_sync_on_step:
        raise MetricError(
            f"{name}: dist_sync_on_step=True: under a pipeline the last stage alone updates metrics; leave it out"
        )
    if metric.dist_sync_fn is not None and not isinstance(metric.dist_sync_fn, _FromLast):
        raise MetricError(f"{name}: under a pipeline the strategy gathers the metric's state; leave out dist_sync_fn")
    if apart := _torchmetrics.lists_apart(metric):
        raise MetricError(
            f"{name}: {type(metric).__name__} keeps lists ({', '.join(apart)}) that are not put together, which works "
            "on one stage alone; write pipeline_parallel_size=1, or log numbers"
        )
