"""Gradients in checkpoints that are written in the middle of a window of accumulated batches.

Data ranks exchange gradients with the last batch of a window; before it each has its own, added up in the whole
weights, which FSDP2 keeps to itself. A checkpoint holds them by data rank. With as many data ranks as before each goes
on with its own; else all go on with the mean, as the exchange would make it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.share import Share
from lightning_bharat.checkpoints.stored import StoredTensor, load_into
from lightning_bharat.checkpoints.weights import Slices, parameter_names
from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies import _torch

GRADIENTS = "lightning_bharat_gradients"


class GradientError(CheckpointError):
    """A checkpoint from the middle of a window, whose gradients it does not have."""


def of_window(module: nn.Module, slices: Slices, layout: Layout, rank: int) -> dict[str, Any]:
    """What this rank's gradients are, for a checkpoint. All ranks must call it."""
    names = parameter_names(module)
    shared, own = {}, {}
    for parameter in module.parameters():
        grad, name = parameter.grad, names[id(parameter)]
        if grad is None:
            continue
        if layout.data == 1 or (isinstance(grad, DTensor) and any(p.is_shard() for p in grad.placements)):
            shared[name] = Share.of(grad, slices.get(name))
        else:
            own[name] = grad.to_local() if isinstance(grad, DTensor) else grad
    own |= {names[id(parameter)]: grad for parameter, grad in _torch.own_gradients(module)}
    return {"shared": shared, "of_data": _by_data_ranks(own, slices, layout, rank)}


def _by_data_ranks(own: dict[str, Tensor], slices: Slices, layout: Layout, rank: int) -> list[dict[str, Share]]:
    """``own`` of each data rank; of the others' as shares that this rank does not hold."""
    known: list[Any] = [{name: (grad.shape, grad.dtype) for name, grad in own.items()}]
    if dist.is_initialized():
        known = known * dist.get_world_size()
        dist.all_gather_object(known, known[0])
    here, found = layout.coordinates(rank)["data"], []
    for data in range(layout.data):
        of_rank = known[layout.rank(data=data)]
        if data == here:
            found.append({name: Share.of(own[name], slices.get(name)) for name in of_rank})
        else:
            kinds = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in of_rank.items()}
            found.append({name: Share.nothing(kind, slices.get(name)) for name, kind in kinds.items()})
    return found


def refuse(saved: Mapping[str, Any] | None) -> None:
    """See that the gradients are there, if the checkpoint is one of the middle of a window.

    Raises:
        GradientError: they are not.
    """
    if saved is not None and "refused" in saved:
        raise GradientError(
            f"the checkpoint was written in the middle of a window of accumulated batches, without its gradients: "
            f"{saved['refused']}. Go on from one that was written after an optimizer step"
        )


def take_up(saved: Mapping[str, Any], module: nn.Module, slices: Slices, layout: Layout, rank: int) -> None:
    """Go on with the gradients of :func:`of_window`."""
    names = parameter_names(module)
    parameters = {names[id(parameter)]: parameter for parameter in module.parameters()}
    for name, value in saved["shared"].items():
        parameters[name].grad = _filled(torch.empty_like(parameters[name].detach()), slices.get(name), [value])
    of_data = saved["of_data"]
    kept = len(of_data) == layout.data
    records = _torch.gradient_records(module) if kept else {}
    chosen = [of_data[layout.coordinates(rank)["data"]]] if kept else of_data
    for name in dict.fromkeys(name for own in chosen for name in own):
        parameter, values = parameters[name], [own[name] for own in chosen if name in own]
        record = records.get(id(parameter))
        like = parameter.detach() if record is None else record.whole_like()
        grad = _filled(torch.empty_like(like), slices.get(name), values, divided_by=len(chosen))
        if record is None:
            parameter.grad = grad
        else:
            record.add_to(grad)


@torch.no_grad()
def _filled(tensor: Tensor, cut: Any, values: Iterable[StoredTensor | Tensor], divided_by: int = 1) -> Tensor:
    """The sum of ``values``, as far as this rank holds it, in the place of ``tensor``."""
    total = None
    for value in values:
        load_into([(Share.of(tensor, cut), value)])
        total = tensor.clone() if total is None else total + tensor
    assert total is not None
    return total if divided_by == 1 else total / divided_by
