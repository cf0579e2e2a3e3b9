"""What optimizers and schedulers were made with, and how the new values get behind a restored state.

A checkpoint brings back the donor's optimizer and schedulers, and with them the donor's learning rate and whatever else
a parameter group or a scheduler was made with. What the new configuration makes otherwise is set again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bharat.strategies._torch import LAST_RATES, note_rates


def made_with(trainer: pl.Trainer) -> dict[str, Any]:
    """What optimizers and schedulers that have made no step were made with: plain values alone.

    Args:
        trainer: in ``on_fit_start``, before it restores their state.
    """
    groups = [
        [{key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    return {"groups": groups, "schedulers": [_attributes(each.scheduler) for each in trainer.lr_scheduler_configs]}


def set_again(trainer: pl.Trainer, before: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Set what is made otherwise than in the donor.

    Args:
        trainer: after it has restored their state.
        before: what the donor's were made with.
        made: what these were made with.

    Raises:
        ValueError: the donor's are of another kind, so that their state means nothing here.
    """
    theirs, ours = _kinds(before), _kinds(made)
    if theirs != ours:
        raise ValueError(f"the donor's optimizers and schedulers have the options {theirs}, and these {ours}")
    for optimizer, olds, news in zip(trainer.optimizers, before["groups"], made["groups"], strict=True):
        for group, old, new in zip(optimizer.param_groups, olds, news, strict=True):
            for key in _changed(old, new):
                _put(group, key, _scaled(group.get(key), old[key], new[key]))
    for config, old, new in zip(trainer.lr_scheduler_configs, before["schedulers"], made["schedulers"], strict=True):
        _set_scheduler(config.scheduler, old, new)


def _kinds(made: Mapping[str, Any]) -> list[Any]:
    """The names of all options, which tell one class from another."""
    return [[[sorted(group) for group in groups] for groups in made["groups"]], [sorted(s) for s in made["schedulers"]]]


def _attributes(scheduler: Any) -> dict[str, Any]:
    plain = {key: _plain(value) for key, value in vars(scheduler).items() if _is_plain(value)}
    inner = [_attributes(each) for each in getattr(scheduler, "_schedulers", [])]
    return {**plain, "_schedulers": inner} if inner else plain


def _set_scheduler(scheduler: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    inner = getattr(scheduler, "_schedulers", [])
    for each, was, is_now in zip(inner, old.get("_schedulers", []), new.get("_schedulers", []), strict=True):
        _set_scheduler(each, was, is_now)
    for key in _changed(old, new):
        if key == LAST_RATES:  # what the groups have now, the schedule's progress included
            note_rates(scheduler)
        elif key != "_schedulers":
            now = getattr(scheduler, key)
            setattr(scheduler, key, type(now)(dict(new[key])) if isinstance(now, dict) else new[key])


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in new if key in old and old[key] != new[key]]


def _scaled(now: Any, old: Any, new: Any) -> Any:
    """What a schedule has made of a value, of the new one: as many times the value that it began with."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    if not numbers or _plain(now) == old or not old:
        return new
    return _plain(now) * new / old


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):  # a learning rate on the device
        with torch.no_grad():
            group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _plain(value: Any) -> Any:
    """As it comes back from any checkpoint: no tensors, tuples or keys that are numbers."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, dict):  # the milestones of MultiStepLR
        return sorted([key, _plain(each)] for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, int) and _is_plain(each) for key, each in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, Tensor) and value.numel() == 1)
    )
