"""Running averages of a module's weights, of which each rank keeps those of its own pieces. No communication."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from lightning_bharat.checkpoints.weights import parameter_names
from lightning_bharat.plan.elsewhere import is_elsewhere

One = Callable[[Tensor, Tensor, Tensor], Tensor]
Many = Callable[[list[Tensor], list[Tensor], Tensor], None]


class Averages:
    """Averages of the parameters and buffers of ``module``, which lie as these do; at first equal to them.

    Args:
        module: cut over ranks in any way, or whole.
        device: where to keep them; ``None``: where each tensor is.
        count: of the weights that they are the average of.

    Attributes:
        tensors: the averages, by full names (of tied tensors the first); while ``exchanged``, what they stand in for.
        exchanged: whether the module holds the averages now, and ``tensors`` its own values.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, device: torch.device | None, count: int = 1) -> None:
        self.device, self.count, self.exchanged = device, count, False
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """Take the types and devices that the module's tensors have now."""
        now = tensors_of(module)
        self.tensors = {
            name: kept.to(self.device or now[name].device, now[name].dtype) for name, kept in self.tensors.items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, one: One | None, many: Many | None, use_buffers: bool) -> None:
        """Take in the weights that ``module`` has now.

        ``one`` gives a new average, (average, weight, count) -> average; ``many`` changes lists of averages of one
        device and type; with neither each of the weights counts the same. They see this rank's pieces, as plain
        tensors, so they must work element by element. Buffers that are not floating point (counts, masks), or all
        without ``use_buffers``, are copied.
        """
        parameters = {name for name, _ in module.named_parameters()}
        averaged: list[tuple[Tensor, Tensor]] = []
        constants: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, tensor in tensors_of(module).items():
            average = _local(self.tensors[name])
            current = _local(tensor).to(average.device)
            if name in parameters:
                averaged.append((average, current))
            elif use_buffers and average.is_floating_point():
                averaged.append((average, current))
                constants.append((average, average.clone(), current))
            else:
                average.copy_(current)
        self._average(averaged, one, many)
        for average, before, current in constants:  # the average of a mask's infinities would not be a number
            average.copy_(torch.where(before == current, current, average))
        self.count += 1

    def _average(self, pairs: list[tuple[Tensor, Tensor]], one: One | None, many: Many | None) -> None:
        count = torch.tensor(self.count)
        if one is not None:
            for average, current in pairs:
                average.copy_(one(average, current, count.to(average.device)))
            return
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for average, current in pairs:
            groups.setdefault((average.device, average.dtype), []).append((average, current))
        for (device, _), group in groups.items():
            averages, weights = map(list, zip(*group, strict=True))
            if many is not None:
                many(averages, weights, count.to(device))
            else:  # a tensor for a count would make the share of each weight a float32
                get_swa_multi_avg_fn()(averages, weights, self.count)

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Put the averages into ``module`` and keep its own values; called again, put these back."""
        for name, tensor in tensors_of(module).items():
            kept, shown = _local(self.tensors[name]), _local(tensor)
            own = shown.clone()
            shown.copy_(kept)
            kept.copy_(own)
        self.exchanged = not self.exchanged


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are here and buffers, by full names (of tied ones the first); none is gathered from other
    ranks."""
    parameter_names(module)
    here = {name: parameter for name, parameter in module.named_parameters() if not is_elsewhere(parameter)}
    return {**here, **dict(module.named_buffers())}


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
