"""Floating-point operations of what runs, by torch's own registry."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_flop_count


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention while it is entered.

    Unlike torch's ``FlopCounterMode`` it puts no hooks on modules and tensors, which the dry run would see.

    Attributes:
        total: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # which the registry lacks
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif operator is torch.ops.aten._grouped_mm and args[0].ndim == 2 and args[1].ndim == 3:  # and this one
            self.total += mm_flop(args[0].shape, args[1].shape[1:])
        elif operator in flop_registry:
            self.total += flop_registry[operator](*args, **(kwargs or {}), out_val=out)
        return out
