"""A dry run is on one rank: what it would exchange with others waits for nobody, and is refused."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bharat.plan.blocks import UNCUT, PlanError


class Alone(TorchDispatchMode):
    """Raises where a person's code calls a collective of ``torch.distributed``, directly or not.

    Raises:
        PlanError: names the collective.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            raise PlanError(
                f"the training step exchanges with other ranks ({func.overloadpacket}), and what it does is "
                "seen on one. Exchange by the strategy (self.trainer.strategy.reduce(value), self.all_gather(value)), "
                f"or {UNCUT}"
            )
        return func(*args, **(kwargs or {}))
