"""What a schedule of a pipeline leaves idle, and how many micro-batches it keeps at once, from sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from lightning_bharat.plan.partition import LOOPED, V, stages_of

Live = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule of ``each`` stages on a rank.

    Attributes:
        placement: how stages lie on ranks.
        recomputes: whether it goes together with recomputation: not where gradients of weights are computed apart.
        idle: seconds, for each rank but one, that a rank waits in a step, from those that a stage takes for a forward
            pass, the backward pass of its inputs and that of its weights.
        live: (rank, ranks, micro-batches) -> the most forward passes of each of the rank's stages that are kept at
            once; several, where one stage has most when another has not.
        takes: whether a number of micro-batches can be scheduled on a number of ranks.
    """

    name: str
    each: int
    idle: Callable[[float, float, float], float]
    live: Callable[[int, int, int], tuple[Live, ...]]
    placement: str = LOOPED
    recomputes: bool = True
    takes: Callable[[int, int], bool] = lambda ranks, microbatches: True

    def stages_of(self, rank: int, ranks: int) -> list[int]:
        """The stages of ``rank``, in order."""
        return stages_of(rank, ranks, self.each, self.placement)


def _one_forward_one_backward(rank: int, ranks: int, microbatches: int) -> tuple[Live, ...]:
    return ((min(microbatches, ranks - rank),),)


@cache
def _interleaved(rank: int, ranks: int, microbatches: int) -> tuple[Live, ...]:
    """Warm up with forward passes, then one forward and one backward pass in turns (Narayanan et al., 2021, 2.2)."""
    round_, total = microbatches // max(1, microbatches // ranks), 2 * microbatches
    ahead = min(round_ + 2 * (ranks - 1 - rank), total)
    live, most = [0, 0], {(0, 0)}
    for done in range(total + ahead):
        if done < total:
            live[done // round_ % 2] += 1
            most.add((live[0], live[1]))
        if done >= ahead:
            live[1 - (done - ahead) // round_ % 2] -= 1
    return tuple(m for m in most if not any(m != o and m[0] <= o[0] and m[1] <= o[1] for o in most))


def _rounds(ranks: int, microbatches: int) -> bool:
    return microbatches % max(1, microbatches // ranks) == 0


def _zero_bubble_v(rank: int, ranks: int, microbatches: int) -> tuple[Live, ...]:
    """Of both stages together as many as 1F1B's first rank keeps, on all ranks (Qi et al., 2024, section 6)."""
    turns = ((2 * ranks - rank, rank), (2 * ranks - 1 - rank, rank + 1))
    return tuple((min(first, microbatches), min(last, microbatches)) for first, last in turns)


# Narayanan et al. (2021, https://arxiv.org/abs/2104.04473) for the first two, Qi et al. (2024,
# https://arxiv.org/abs/2401.10241) for the third. GPipe and LoopedBFS are idle as long as the first two, and keep more.
SCHEDULES = (
    Schedule("1F1B", 1, lambda f, i, w: f + i + w, _one_forward_one_backward),
    Schedule("Interleaved1F1B", 2, lambda f, i, w: f + i + w, _interleaved, takes=_rounds),
    Schedule("ZBVZeroBubble", 2, lambda f, i, w: max(f + i - w, 0.0), _zero_bubble_v, V, recomputes=False),
)
NONE = Schedule("", 1, lambda f, i, w: 0.0, lambda rank, ranks, microbatches: ((1,),))
