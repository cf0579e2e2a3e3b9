"""Pipeline schedules by name, of ``torch.distributed.pipelining``, made for the shapes of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules

from lightning_bharat.plan.partition import LOOPED, V
from lightning_bharat.strategies.stage import Stage
from lightning_bharat.strategies.timeline import Clock, TimedStage


@dataclass(frozen=True)
class Kind:
    """A schedule.

    Attributes:
        make: torch's class.
        each: stages on a rank.
        placement: how they lie on ranks.
        split_backward: whether gradients of weights are computed apart.
        fallback: the schedule with the same stages that also takes numbers of micro-batches that this one refuses.
    """

    make: Any
    each: int = 1
    placement: str = LOOPED
    split_backward: bool = False
    fallback: Any = None


KINDS = {
    "GPipe": Kind(schedules.ScheduleGPipe),
    "1F1B": Kind(schedules.Schedule1F1B, fallback=schedules.ScheduleGPipe),
    "LoopedBFS": Kind(schedules.ScheduleLoopedBFS, 2),
    "Interleaved1F1B": Kind(schedules.ScheduleInterleaved1F1B, 2, fallback=schedules.ScheduleLoopedBFS),
    "InterleavedZeroBubble": Kind(
        schedules.ScheduleInterleavedZeroBubble, 2, split_backward=True, fallback=schedules.ScheduleLoopedBFS
    ),
    "ZBVZeroBubble": Kind(schedules.ScheduleZBVZeroBubble, 2, V, split_backward=True),
    "DualPipeV": Kind(schedules.ScheduleDualPipeV, 2, V, split_backward=True, fallback=schedules.ScheduleZBVZeroBubble),
}


def make(
    kind: Kind,
    stages: Sequence[Stage],
    total: int,
    hidden: Tensor,
    number: int,
    group: dist.ProcessGroup,
    clock: Clock,
) -> Any:
    """A schedule for ``number`` micro-batches.

    Args:
        stages: this rank's.
        total: stages of all ranks.
        hidden: on ``meta``: shape and type of what goes from stage to stage.
        number: of micro-batches.
        group: the pipeline's ranks.
        clock: of this rank's work.
    """
    device = hidden.device
    made = [
        TimedStage(
            stage,
            stage.index,
            total,
            device,
            input_args=() if stage.is_first else hidden.requires_grad_(),
            output_args=torch.zeros((), device=device) if stage.is_last else hidden.requires_grad_(),
            group=group,
        )
        for stage in stages
    ]
    for timed in made:
        timed.clock = clock
    options: dict[str, Any] = {"loss_fn": _loss, "scale_grads": False}
    arguments = (made if kind.each > 1 else made[0], number)
    try:
        return kind.make(*arguments, **options)
    except ValueError:  # too few micro-batches, or a number that does not divide: at an epoch's end
        if kind.fallback is None:
            raise
        return kind.fallback(*arguments, **options)


def _loss(output: Tensor, target: Any) -> Tensor:
    return output
