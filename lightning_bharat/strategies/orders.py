"""In which order each rank of a pipeline works under a schedule, without running it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules

from lightning_bharat.strategies.schedule import Kind
from lightning_bharat.strategies.simulation import BACKWARD, FORWARD, INPUT, WEIGHT, Order, Work

_KINDS = {"FORWARD": FORWARD, "FULL_BACKWARD": BACKWARD, "BACKWARD_INPUT": INPUT, "BACKWARD_WEIGHT": WEIGHT}


def order_of(kind: Kind, ranks: int, microbatches: int) -> Order | None:
    """The work of all ranks; ``None`` where the schedule can't take that many micro-batches."""
    if kind.each == 1:
        return _of_one_stage(kind, ranks, microbatches)
    # all that torch's schedules ask of a stage when they write their order down
    asked = SimpleNamespace(num_stages=ranks * kind.each, group_size=ranks, group_rank=0, submod=None)
    try:
        made = kind.make([asked] * kind.each, microbatches)
    except ValueError:
        return None
    return {rank: [_works(a) for a in actions if a is not None] for rank, actions in made.pipeline_order.items()}


def _of_one_stage(kind: Kind, ranks: int, microbatches: int) -> Order | None:
    """As torch runs them. (Its own table of 1F1B counts the last rank's micro-batches from 1.)"""
    alternate = kind.make is schedules.Schedule1F1B
    if alternate and microbatches < ranks:
        return None
    order: dict[int, list[tuple[Work, ...]]] = {}
    for rank in range(ranks):
        forward: list[tuple[Work, ...]] = [(Work(rank, mb, FORWARD),) for mb in range(microbatches)]
        backward: list[tuple[Work, ...]] = [(Work(rank, mb, BACKWARD),) for mb in range(microbatches)]
        ahead = ranks - rank if alternate else microbatches
        turns = [work for pair in zip(backward, forward[ahead:], strict=False) for work in pair]
        order[rank] = forward[:ahead] + turns + backward[microbatches - ahead :]
    return order


def _works(action: Any) -> tuple[Work, ...]:
    inside = action.sub_actions or (action,)
    return tuple(Work(a.stage_index, a.microbatch_index, _KINDS[a.computation_type.name]) for a in inside)
