"""The one file that touches private names of torchmetrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_mean


def lists_apart(metric: Metric) -> list[str]:
    """States that are lists and are not put together when ranks are gathered."""
    lists = [key for key, default in metric._defaults.items() if isinstance(default, list)]
    return [key for key in lists if metric._reductions[key] is not dim_zero_cat]


def updates(metric: Metric) -> int:
    """How often it was updated since it was reset."""
    return metric._update_count


def know_of_updates(metric: Metric, count: int) -> None:
    """Another rank has updated its part of ``metric``: what was computed before does not hold."""
    if metric._update_count != count:
        metric._update_count, metric._computed = count, None


def set_last_value(metric: Metric, value: Any) -> None:
    """What ``metric`` was on the last batch, which is logged by steps."""
    metric._forward_cache = value


def of_this_rank(metric: Metric) -> Metric:
    """A copy without states, which is not gathered from other ranks."""
    made = copy.deepcopy(metric, {id(metric.process_group): metric.process_group})
    vars(made).pop("forward", None)
    made._to_sync = False
    made.reset()
    return made


def keep_lists(metric: Metric) -> None:
    """States that are lists, and that gathering has made one tensor, are lists again."""
    for key, default in metric._defaults.items():
        if isinstance(default, list) and isinstance(value := getattr(metric, key), Tensor):
            setattr(metric, key, [value])


def save_all(metrics: Iterable[Metric]) -> Callable[[], None]:
    """Let all states of ``metrics`` be in their ``state_dict``; returns what makes it as it was."""
    were = [(metric, dict(metric._persistent)) for metric in metrics]
    for metric, _ in were:
        metric.persistent(True)

    def undo() -> None:
        for metric, was in were:
            metric._persistent.update(was)

    return undo


def forget(metric: Metric) -> None:
    """Reset all states but those of which the mean over ranks is taken."""
    for key, default in metric._defaults.items():
        if metric._reductions[key] is not dim_zero_mean:
            value: Any = default.detach().clone().to(metric.device) if isinstance(default, Tensor) else []
            setattr(metric, key, value)
    metric._computed = None


def unsaved(metric: Metric) -> dict[str, Any]:
    """Copies of the states of ``metric`` that are not in its ``state_dict``, in host memory."""
    states = {key: getattr(metric, key) for key in metric._defaults if not metric._persistent[key]}
    return {key: _map(lambda t: t.detach().cpu().clone(), value) for key, value in states.items()}


def take_up(metric: Metric, states: dict[str, Any], updates: int) -> None:
    """Go on from :func:`unsaved`."""
    for key, value in states.items():
        setattr(metric, key, _map(lambda t: t.to(metric.device), value))
    metric._update_count, metric._computed = updates, None


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return [function(each) for each in value] if isinstance(value, list) else function(value)
