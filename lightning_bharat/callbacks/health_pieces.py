"""How a strategy's ranks hold gradients, for what looks at them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from lightning_bharat.health.gradients import Held
from lightning_bharat.strategies.precision import Divided, local_piece


def piece(tensor: Tensor) -> Tensor:
    """What this rank has of a parameter, buffer or gradient, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # without it a node of a graph would be made
        return tensor.to_local()


def holder(trainer: pl.Trainer) -> Callable[[Tensor], Held]:
    """Tells how this rank holds a parameter's gradient, under the trainer's strategy."""
    plugin: Any = trainer.strategy.precision_plugin
    groups_of = getattr(plugin, "groups_of", lambda _: ())
    pipeline, copies_on_stages = getattr(plugin, "stages", lambda: (None, lambda _: 1))()
    world, stages = trainer.world_size, pipeline.size() if pipeline is not None else 1
    known: Divided = {}

    def held(parameter: Tensor) -> Held:
        gradient = parameter.grad
        assert gradient is not None
        groups = dict.fromkeys((*local_piece(gradient, known)[1], *groups_of(parameter)))
        divided = stages // copies_on_stages(parameter)
        for group in groups:
            divided *= group.size()
        return Held(world / divided, _piece_of(gradient, known))

    return held


def _piece_of(gradient: Tensor, known: Divided) -> Callable[[Tensor], Tensor]:
    if isinstance(gradient, DTensor) and any(isinstance(placement, Partial) for placement in gradient.placements):
        return lambda now: local_piece(now, known)[0]
    return piece
