"""The norm of all gradients from what each rank holds, by one sum over all ranks; and gradients that are no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """How this rank holds a gradient.

    Attributes:
        copies: on how many ranks each element of it is.
        piece: what this rank has of the gradient of a parameter.
    """

    copies: float
    piece: Callable[[Tensor], Tensor]


class NormShare:
    """This rank's share of the squared norm: summed over all ranks, each element of a whole gradient counts once.

    Args:
        parameters: of one optimizer.
        held: how this rank holds a parameter's gradient; asked once, when there is one.
    """

    def __init__(self, parameters: Iterable[Tensor], held: Callable[[Tensor], Held]) -> None:
        self.parameters = list(parameters)
        self._held = held
        self._present: list[int] = []
        self._pieces: list[Callable[[Tensor], Tensor]] = []
        self._listed: list[float] = []
        self._shares = torch.empty(0)

    @torch.no_grad()
    def squared(self, device: torch.device) -> Tensor | float:
        """0-dimensional, float64, on ``device``; on the CPU a number of Python's."""
        present = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not present:
            return 0.0
        if present != self._present:
            held = [self._held(self.parameters[i]) for i in present]
            self._present, self._pieces = present, [each.piece for each in held]
            self._listed = [1 / each.copies for each in held]
            self._shares = torch.tensor(self._listed, dtype=torch.float64, device=device)
        pieces = [piece(self.parameters[i].grad) for i, piece in zip(present, self._pieces, strict=True)]  # type: ignore[arg-type]
        norms = torch._foreach_norm(pieces, 2, dtype=_sums_in(pieces))
        if device.type == "cpu":  # where some numbers are added faster by themselves than by operators
            return sum(norm.item() ** 2 * share for norm, share in zip(norms, self._listed, strict=True))
        stacked = torch.stack(norms).to(device, torch.float64)
        return torch.dot(stacked * stacked, self._shares)


def _sums_in(gradients: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Any]], local: Callable[[Tensor], Tensor]) -> tuple[list[str], list[str]]:
    """Names of parameters whose gradients, and of those whose own values, are not finite here."""
    gradients, values = [], []
    for name, parameter in named:
        if parameter.is_meta:
            continue
        if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
            gradients.append(name)
        if not bool(torch.isfinite(local(parameter)).all()):
            values.append(name)
    return gradients, values
