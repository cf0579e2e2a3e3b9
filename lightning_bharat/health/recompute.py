"""Silent corruption: gradients of a step that is computed again, compared with the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Kernels that add in no fixed order differ by rounding, on devices where such are used.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Computed:
    """A step's losses and gradients here.

    Attributes:
        losses: of each accumulated batch.
        gradients: by name.
    """

    losses: list[float]
    gradients: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls, losses: Iterable[Tensor], named: Iterable[tuple[str, Tensor]], local: Callable[[Tensor], Tensor]
    ) -> Computed:
        """Of parameters as they are now; gradients are not copied."""
        found = {name: local(p.grad) for name, p in named if not p.is_meta and p.grad is not None}
        return cls([float(loss) for loss in losses], found)


def is_exact(device: torch.device) -> bool:
    """Whether the same step must give the same bits."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


@torch.no_grad()
def differs(first: Computed, again: Computed, exact: bool) -> str:
    """What is not the same, in words; empty if all is."""
    for i, (loss, loss_again) in enumerate(zip(first.losses, again.losses, strict=True)):
        apart = abs(loss - loss_again)
        if apart > (0 if exact else 1e-3 * max(abs(loss), abs(loss_again))):
            return f"the loss of batch {i} ({loss!r}, then {loss_again!r})"
    if first.gradients.keys() != again.gradients.keys():
        return "which weights have gradients"
    for name, one in first.gradients.items():
        other = again.gradients[name]
        if exact:
            if not torch.equal(one, other):
                return f"the gradient of {name}"
        elif float((one - other).norm()) > _ROUNDING.get(one.dtype, 1e-2) * max(float(one.norm()), 1e-12):
            return f"the gradient of {name}"
    return ""
