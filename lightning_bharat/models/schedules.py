"""Learning-rate schedules by optimizer step, for ``lr_scheduler`` by class path or with ``interval="step"``.

Each is a closed formula of the step, so a resumed run goes on with the same bits. ``step`` counts from 0: it is the
number of optimizer steps done. All begin with a linear warm-up, (step + 1) / (warmup_steps + 1), which wastes no step
at a rate of 0 and reaches the optimizer's own rate at ``step == warmup_steps``.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Warmup(LRScheduler):
    """Warm-up, then the optimizer's rates as they are; the base of the others.

    Args:
        optimizer: whose groups' rates are multiplied.
        warmup_steps: steps before the full rate.
        last_epoch: the step to go on from; -1 starts.

    Raises:
        ValueError: ``warmup_steps`` is negative.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, last_epoch: int = -1) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} is negative; write 0 for none")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """What the optimizer's rates are multiplied by at ``step``."""
        return self.after_warmup(step) if step >= self.warmup_steps else (step + 1) / (self.warmup_steps + 1)

    def after_warmup(self, step: int) -> float:
        """The factor from ``warmup_steps`` on."""
        return 1.0

    def get_lr(self) -> list[float | Tensor]:
        """Rates of the groups at this step."""
        factor = self.factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]


class Decay(Warmup):
    """Warm-up, then a fall to ``final`` times the rate at ``total_steps``, where it stays.

    Args:
        optimizer: whose groups' rates are multiplied.
        warmup_steps: steps before the full rate.
        total_steps: steps of the whole run, warm-up included.
        final: the last factor, 0 to 1.
        last_epoch: the step to go on from; -1 starts.

    Raises:
        ValueError: the warm-up is not shorter than the run, or ``final`` is not from 0 to 1.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int, total_steps: int, final: float = 0.1, last_epoch: int = -1
    ) -> None:
        if total_steps <= warmup_steps:
            raise ValueError(
                f"total_steps={total_steps} must be more than warmup_steps={warmup_steps}, which it counts"
            )
        if not 0 <= final <= 1:
            raise ValueError(f"final={final} is the last rate's share of the full one; write a number from 0 to 1")
        self.total_steps, self.final = total_steps, final
        super().__init__(optimizer, warmup_steps, last_epoch)

    def after_warmup(self, step: int) -> float:
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final + (1 - self.final) * self.left(min(done, 1.0))

    def left(self, done: float) -> float:
        """From 1 to 0, as ``done`` goes from 0 to 1."""
        raise NotImplementedError


class WarmupCosine(Decay):
    """Half a cosine (SGDR without restarts, https://arxiv.org/abs/1608.03983): (1 + cos(π · done)) / 2."""

    def left(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2


class WarmupLinear(Decay):
    """A straight line: 1 - done."""

    def left(self, done: float) -> float:
        return 1 - done


class WarmupStableDecay(Decay):
    """The full rate until the last ``decay_steps``, then a fall (Hägele et al., 2024, https://arxiv.org/abs/2405.18392).

    A checkpoint from the stable part can be trained for longer; its schedule need not be known beforehand.

    Args:
        optimizer: whose groups' rates are multiplied.
        warmup_steps: steps before the full rate.
        total_steps: steps of the whole run, warm-up and decay included.
        decay_steps: steps of the fall; a fifth of ``total_steps`` if None.
        shape: 1 - √done, that work's best, or 1 - done.
        final: the last factor, 0 to 1.
        last_epoch: the step to go on from; -1 starts.

    Raises:
        ValueError: warm-up and decay are longer than the run, or ``final`` is not from 0 to 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        decay_steps: int | None = None,
        shape: Literal["sqrt", "linear"] = "sqrt",
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        decay_steps = max(1, total_steps // 5) if decay_steps is None else decay_steps
        if decay_steps < 1 or warmup_steps + decay_steps > total_steps:
            raise ValueError(
                f"decay_steps={decay_steps} must be from 1 to total_steps - warmup_steps = {total_steps - warmup_steps}"
            )
        if shape not in ("sqrt", "linear"):
            raise ValueError(f"shape={shape!r} is unknown; write 'sqrt' or 'linear'")
        self.decay_steps, self.shape = decay_steps, shape
        super().__init__(optimizer, warmup_steps, total_steps, final, last_epoch)

    def after_warmup(self, step: int) -> float:
        done = (step - (self.total_steps - self.decay_steps)) / self.decay_steps
        return self.final + (1 - self.final) * self.left(min(max(done, 0.0), 1.0))

    def left(self, done: float) -> float:
        return 1 - (math.sqrt(done) if self.shape == "sqrt" else done)


class InverseSquareRoot(Warmup):
    """√((warmup_steps + 1) / (step + 1)): no end has to be known (Vaswani et al., 2017, section 5.3)."""

    def after_warmup(self, step: int) -> float:
        return math.sqrt((self.warmup_steps + 1) / (step + 1))
