"""Weights and optimizer states of any checkpoint into an engine of DeepSpeed: any stage, any number of ranks.

DeepSpeed itself continues only with as many ranks and the stage that saved, and reads its files by running what is in
them. Here values come by full names, each rank takes its parts of them, and no file can run anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bharat.checkpoints import optimizers, weights
from lightning_bharat.checkpoints.errors import CheckpointError, together
from lightning_bharat.checkpoints.stored import StoredTensor
from lightning_bharat.strategies import _deepspeed

Values = Mapping[str, Any]


def fill_weights(module: pl.LightningModule, optimizer: Any, values: Values, strict: bool) -> None:
    """Give ``module``, and what ``optimizer`` steps on, the weights of a checkpoint. All ranks must call it.

    Raises:
        CheckpointError: on every rank: names or shapes differ; it lists them.
    """
    divided = {name: p for name, p in module.named_parameters() if _deepspeed.is_divided(p)}
    if not divided:
        together(lambda: weights.load_weights(module, {}, values, strict))
    else:
        together(lambda: _check(module, divided, values, strict))
        for name, parameter in divided.items():
            if name in values:
                _deepspeed.fill_parameter(parameter, _read(values[name]))
        rest = {name: _read(values[name]) for name in _names(module) - divided.keys() if name in values}
        module.load_state_dict({n: v for n, v in rest.items() if not _is_tied(module, n)}, strict=False)
    if optimizer is not None and not _steps_itself(optimizer):
        names = weights.parameter_names(module)
        _deepspeed.fill_masters(optimizer, lambda p: _found(values, names[id(p)]))


def fill_optimizer(module: pl.LightningModule, optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Give ``optimizer`` its state in a checkpoint. All ranks must call it.

    Raises:
        CheckpointError: on every rank: other groups or parameters, or parameters of a group with different steps,
            which DeepSpeed steps together.
    """
    names = weights.parameter_names(module)
    if _steps_itself(optimizer):
        together(lambda: optimizers.load_state(optimizer, names, {}, saved))
        return
    groups = _groups(optimizer, names)
    state = together(lambda: optimizers.with_names(saved, groups))
    together(lambda: _check_shapes(module, state))
    for key in sorted({key for own in state.values() for key in own}):
        entries = {name: own[key] for name, own in state.items() if key in own}
        together(partial(_fill_key, optimizer, key, entries, names))
    for group, options in zip(_deepspeed.base_of(optimizer).param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in options.items() if key != "params"})


def _fill_key(optimizer: Any, key: str, entries: Values, names: Mapping[int, str]) -> None:
    if any(_is_whole(value) for value in entries.values()):
        _deepspeed.fill_state(optimizer, key, lambda p: _found(entries, names[id(p)]))
    else:
        _fill_numbers(optimizer, key, entries, names)


def _fill_numbers(optimizer: Any, key: str, entries: Values, names: Mapping[int, str]) -> None:
    """State that has no parameter's shape, such as the number of steps: one for all that is stepped on together."""
    for flat, parts in _deepspeed.flats(optimizer):
        own = {names[id(p)]: entries[names[id(p)]] for p, *_ in parts if names[id(p)] in entries}
        different = {float(_read(value)) for value in own.values()}
        if len(different) > 1:
            raise CheckpointError(
                f"optimizer state {key!r} differs between parameters ({', '.join(map(str, sorted(different)))}) that "
                "DeepSpeed steps together; write stage=0, or begin without the optimizer's state"
            )
        for value in list(own.values())[:1]:
            value = _read(value)
            _deepspeed.base_of(optimizer).state[flat][key] = value.clone() if isinstance(value, Tensor) else value


def _groups(optimizer: Any, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The optimizer's groups with parameters by name, as the module made them."""
    return [{"params": [names[id(p)] for p in group]} for group in _deepspeed.groups(optimizer)]


def _check(module: pl.LightningModule, divided: Mapping[str, Any], values: Values, strict: bool) -> None:
    known, firsts = _names(module), weights.first_names(module)
    present = {firsts.get(name, name) for name in values}
    missing = [name for name in known if name not in values and firsts.get(name, name) not in present]
    unexpected = [name for name in values if name not in known]
    differ = [
        f"{name} is {list(values[name].shape)} in the checkpoint and {list(_deepspeed.shape_of_whole(p))} here"
        for name, p in divided.items()
        if name in values and tuple(values[name].shape) != _deepspeed.shape_of_whole(p)
    ]
    weights.refuse_other_model(missing if strict else [], unexpected if strict else [], differ)


def _check_shapes(module: pl.LightningModule, state: Mapping[str, Mapping[str, Any]]) -> None:
    shapes = {name: _deepspeed.shape_of_whole(p) for name, p in module.named_parameters()}
    differ = [
        f"optimizer state {key!r} of {name} is {list(value.shape)} in the checkpoint and {list(shapes[name])} here"
        for name, own in state.items()
        for key, value in own.items()
        if _is_whole(value) and tuple(value.shape) != shapes[name]
    ]
    weights.refuse_other_model([], [], differ)


def _names(module: pl.LightningModule) -> set[str]:
    return set(module.state_dict())


def _is_tied(module: pl.LightningModule, name: str) -> bool:
    return weights.first_names(module).get(name, name) != name


def _is_whole(value: Any) -> bool:
    """Whether a state has its parameter's shape."""
    return isinstance(value, (Tensor, StoredTensor)) and len(value.shape) > 0


def _found(values: Values, name: str) -> Tensor | None:
    return _read(values[name]) if name in values else None


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, StoredTensor) else value


def _steps_itself(optimizer: Any) -> bool:
    """Whether it is torch's optimizer of the module's own parameters: stage 0."""
    return isinstance(optimizer, torch.optim.Optimizer)
