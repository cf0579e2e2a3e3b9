"""Weights, optimizers and schedulers of this rank as they were some steps ago, in its own memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Snapshot:
    """Copies of what this rank holds, sharded or whole. No communication.

    The loop's own counters are not part of it: after :meth:`restore` training goes on with the data that comes next.

    Args:
        step: at which it is taken.
        buffers: of the module.
        optimizers: with the parameters that train, and their states.
        schedulers: of learning rates.
        local: what this rank holds of a tensor.
    """

    @torch.no_grad()
    def __init__(
        self,
        step: int,
        buffers: Iterable[Tensor],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Any],
        local: Callable[[Tensor], Tensor],
    ) -> None:
        self.step, self._local = step, local
        self._optimizers, self._schedulers = list(optimizers), list(schedulers)
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        tensors = [tensor for tensor in (*held, *buffers) if not tensor.is_meta]
        self._tensors = [(tensor, local(tensor).detach().clone()) for tensor in tensors]
        self._states = [{p: self._kept(state) for p, state in o.state.items()} for o in self._optimizers]
        self._groups = [[_without_params(group) for group in o.param_groups] for o in self._optimizers]
        self._of_schedulers = [deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]

    def _kept(self, state: dict[str, Any]) -> dict[str, Any]:
        return {
            key: self._local(value).detach().clone() if isinstance(value, Tensor) else deepcopy(value)
            for key, value in state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back. It can be done again."""
        for tensor, kept in self._tensors:
            self._local(tensor).copy_(kept)
        for optimizer, states, groups in zip(self._optimizers, self._states, self._groups, strict=True):
            for parameter in [p for p in optimizer.state if p not in states]:
                del optimizer.state[parameter]
            for parameter, state in states.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        self._local(optimizer.state[parameter][key]).copy_(value)
                    else:
                        optimizer.state[parameter][key] = deepcopy(value)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(deepcopy(before))
        for scheduler, of_scheduler in zip(self._schedulers, self._of_schedulers, strict=True):
            scheduler.load_state_dict(deepcopy(of_scheduler))


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return deepcopy({key: value for key, value in group.items() if key != "params"})
