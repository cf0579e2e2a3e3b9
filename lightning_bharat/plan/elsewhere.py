"""Parameters that another pipeline stage holds.

They keep their place, name, shape and type in this rank's module, cost one element of memory and read as NaN, so that
what was computed from one by mistake is seen. They never get a gradient, so optimizers pass over them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def elsewhere(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """What stands for ``parameter`` on the ranks that do not hold it."""
    content = torch.nan if parameter.is_floating_point() else 0
    blank = torch.full((), content, dtype=parameter.dtype, device=device).expand(parameter.shape)
    stands = nn.Parameter(blank, requires_grad=parameter.requires_grad)
    stands.__dict__.update(parameter.__dict__, is_elsewhere=True)
    return stands


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether another stage holds this parameter."""
    return getattr(tensor, "is_elsewhere", False)
