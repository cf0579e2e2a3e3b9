"""The state of optimizers by full parameter names: to shares, to torch's own form, and back from both.

State is created from the checkpoint. (torch's ``set_optimizer_state_dict`` takes a step with zero gradients to create
it, which not every optimizer takes for nothing.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.share import Share
from lightning_bharat.checkpoints.stages import Stages
from lightning_bharat.checkpoints.stored import StoredTensor, load_into
from lightning_bharat.checkpoints.weights import Slices, refuse_other_model
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.shards import gather, shape_of_whole


@torch.no_grad()
def state_by_name(
    optimizer: Optimizer, names: Mapping[int, str], slices: Slices, stages: Stages | None = None
) -> dict[str, Any]:
    """State of ``optimizer`` as ``{"param_groups": [{..., "params": [names]}], "state": {name: {key: value}}, "dtypes":
    {name: of the parameter}}``.

    State of a parameter's shape is a :class:`Share` cut as the parameter is; a number is stored once. With ``stages``
    the state of all of them is there, as shares without pieces; all ranks of a pipeline must then call it.

    Raises:
        CheckpointError: a parameter isn't the module's, or state of another shape belongs to a parameter that is
            spread over ranks: its meaning on another layout is unknown.
    """
    state = {
        name: {key: _as_share(key, value, parameter, name, slices) for key, value in optimizer.state[parameter].items()}
        for parameter, name in _named(optimizer, names)
        if parameter in optimizer.state
    }
    if stages is not None:
        state = stages.together(state)
    dtypes = {name: parameter.dtype for parameter, name in _named(optimizer, names)}
    return {"param_groups": _groups(optimizer, names), "state": state, "dtypes": dtypes}


def whole_state_by_index(
    optimizer: Optimizer,
    names: Mapping[int, str],
    slices: Slices,
    tensor_group: ProcessGroup | None,
    keep: bool,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """State of ``optimizer`` in torch's own form, gathered tensor by tensor to host memory; ``{}`` where not ``keep``.

    Plain Lightning on one process loads it. All ranks must call it. Raises as :func:`state_by_name`.
    """
    every = state_by_name(optimizer, names, slices, stages)
    whole: dict[int, dict[str, Any]] = {}
    for index, (parameter, name) in enumerate(_named(optimizer, names)):
        for key, entry in every["state"].get(name, {}).items():
            value = entry
            if isinstance(entry, Share):
                own = optimizer.state.get(parameter, {}).get(key)
                cut = slices.get(name) if own is not None and _like(own, parameter) else None
                value = None if own is None else gather(own, cut, tensor_group)
                if stages is not None:
                    value = stages.tell(stages.holders[name][0], value, entry.shape, entry.dtype)
            if keep:
                whole.setdefault(index, {})[key] = value.cpu() if isinstance(value, Tensor) else value
    return {"state": whole, "param_groups": _numbered(every["param_groups"])} if keep else {}


def load_state(optimizer: Optimizer, names: Mapping[int, str], slices: Slices, saved: Mapping[str, Any]) -> None:
    """Give ``optimizer`` the state ``saved``: of :func:`state_by_name`, or torch's own with numbers for parameters.

    A rank reads its own parts. A parameter without saved state (it had no gradient yet) starts without. State that had
    its parameter's type is cast to the parameter's type of now, as torch does.

    Raises:
        CheckpointError: groups hold other parameters, or a shape differs; it names them.
    """
    groups = _groups(optimizer, names)
    by_name = with_names(saved, groups)
    targets: list[tuple[Share, StoredTensor | Tensor]] = []
    created: dict[Tensor, dict[str, Any]] = {}
    for parameter, name in _named(optimizer, names):
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        if is_elsewhere(parameter):
            continue
        for key, value in by_name.get(name, {}).items():
            if isinstance(value, (Tensor, StoredTensor)):
                own_type = value.dtype not in (parameter.dtype, saved.get("dtypes", {}).get(name, value.dtype))
                new, share = _create(key, value, parameter, name, slices, group, own_type)
                targets.append((share, value))
                value = new
            created.setdefault(parameter, {})[key] = value
    load_into(targets)
    optimizer.state.clear()
    optimizer.state.update(created)
    for group, options in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in options.items() if key != "params"})


def _named(optimizer: Optimizer, names: Mapping[int, str]) -> list[tuple[Tensor, str]]:
    """Parameters in torch's order (by group), with their names."""
    found = []
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise CheckpointError(
                    f"parameter {position} of group {number} of {type(optimizer).__name__} (shape "
                    f"{list(parameter.shape)}) is not a parameter of the module; make it an attribute of the module"
                )
            found.append((parameter, names[id(parameter)]))
    return found


def _groups(optimizer: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    _named(optimizer, names)
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def _numbered(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    numbered, start = [], 0
    for group in groups:
        numbered.append({**group, "params": list(range(start, start + len(group["params"])))})
        start += len(group["params"])
    return numbered


def with_names(saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Saved state by parameter names, after a check that ``saved`` is about the parameters in ``groups``.

    Raises:
        CheckpointError: it is not; names what differs.
    """
    old = saved["param_groups"]
    if len(old) != len(groups):
        raise CheckpointError(f"the checkpoint's optimizer has {len(old)} parameter groups, and this one {len(groups)}")
    state = saved["state"]
    for number, (before, now) in enumerate(zip(old, groups, strict=True)):
        params, names = before["params"], now["params"]
        of = f", by group {number} of the optimizer"
        if all(isinstance(p, int) for p in params):
            if len(params) != len(names):
                raise CheckpointError(
                    f"This is a checkpoint of another model{of}: it has {len(params)} parameters, and here are "
                    f"{len(names)} ({', '.join(names[:3])}, ...)"
                )
            continue
        refuse_other_model([n for n in names if n not in params], [p for p in params if p not in names], [], of)
    renamed = {
        p: name
        for before, now in zip(old, groups, strict=True)
        for p, name in zip(before["params"], now["params"], strict=True)
        if isinstance(p, int)
    }
    return {renamed.get(key, key): value for key, value in state.items()}


def _like(value: Tensor, parameter: Tensor) -> bool:
    return value.shape == parameter.shape and isinstance(value, DTensor) == isinstance(parameter, DTensor)


def _is_whole(parameter: Tensor, name: str, slices: Slices) -> bool:
    return name not in slices and not isinstance(parameter, DTensor)


def _as_share(key: str, value: Any, parameter: Tensor, name: str, slices: Slices) -> Any:
    if not isinstance(value, Tensor):
        if _is_whole(parameter, name, slices) or isinstance(value, (int, float, bool, str, type(None))):
            return value
    elif _like(value, parameter):
        return Share.of(value, slices.get(name))
    elif not isinstance(value, DTensor) and (value.numel() == 1 or _is_whole(parameter, name, slices)):
        return Share.of(value)
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise CheckpointError(
        f"optimizer state {key!r} of {name} is {shape} and the parameter {list(parameter.shape)}, spread over ranks: "
        f"how it would be cut on another layout is unknown. Use an optimizer whose state has its parameter's shape"
    )


def _create(
    key: str,
    value: Tensor | StoredTensor,
    parameter: Tensor,
    name: str,
    slices: Slices,
    group: Mapping[str, Any],
    own_type: bool,
) -> tuple[Tensor, Share]:
    """New state for ``parameter`` that ``value`` fits, and its share; not filled yet."""
    cut = slices.get(name)
    whole = shape_of_whole(parameter, cut)
    if tuple(value.shape) == whole and key != "step":
        cast = value.dtype.is_floating_point and parameter.dtype.is_floating_point and not own_type
        new = torch.empty_like(parameter.detach(), dtype=parameter.dtype if cast else value.dtype)
        return new, Share.of(new, cut)
    if value.shape.numel() == 1 or _is_whole(parameter, name, slices):
        # as torch: the step stays in host memory unless the optimizer's kernels want it on the device
        on_device = key != "step" or group.get("capturable") or group.get("fused")
        new = torch.empty(value.shape, dtype=value.dtype, device=parameter.device if on_device else "cpu")
        return new, Share.of(new)
    shapes = [f"optimizer state {key!r} of {name} is {list(value.shape)} in the checkpoint and {list(whole)} here"]
    refuse_other_model([], [], shapes)
    raise AssertionError
