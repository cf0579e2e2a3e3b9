"""What schedules keep and leave idle, against the orders of work that torch makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_bharat.plan.schedules import SCHEDULES, Schedule
from lightning_bharat.strategies.schedule import KINDS

BY_NAME = {schedule.name: schedule for schedule in SCHEDULES}


def orders(schedule: Schedule, ranks: int, microbatches: int) -> dict[int, list[Any]]:
    """Torch's order of work for each rank, made without ranks."""
    made = [
        SimpleNamespace(
            stage_index=i,
            num_stages=ranks * schedule.each,
            group_size=ranks,
            group_rank=0,
            is_first=i == 0,
            is_last=False,
            has_backward=True,
            submod=None,
        )
        for i in schedule.stages_of(0, ranks)
    ]
    kind = KINDS[schedule.name]
    found = kind.make(made if schedule.each > 1 else made[0], microbatches, loss_fn=lambda *_: None)
    return {rank: _flat(actions) for rank, actions in found.pipeline_order.items()}


def _flat(actions: list[Any]) -> list[Any]:
    return [part for a in actions if a is not None for part in (a.sub_actions or (a,))]


def kept(actions: list[Any], stages: list[int]) -> set[tuple[int, ...]]:
    """How many forward passes of each stage wait for the end of their backward pass, at each moment."""
    live, most = dict.fromkeys(stages, 0), set()
    for action in actions:
        kind = action.computation_type.value
        if kind in ("F", "B", "W"):
            live[action.stage_index] += 1 if kind == "F" else -1
        most.add(tuple(live.values()))
    assert not any(live.values())
    return most


def test_stages_and_placement_are_those_of_the_strategys_schedules() -> None:
    for schedule in SCHEDULES:
        kind = KINDS[schedule.name]
        assert (schedule.each, schedule.placement, schedule.recomputes) == (
            kind.each,
            kind.placement,
            not kind.split_backward,
        )


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 6), (4, 8), (4, 20), (8, 8), (8, 32)])
def test_no_more_is_kept_than_said(name: str, ranks: int, microbatches: int) -> None:
    schedule = BY_NAME[name]
    for rank, actions in orders(schedule, ranks, microbatches).items():
        measured = kept(actions, schedule.stages_of(rank, ranks))
        said = schedule.live(rank, ranks, microbatches)
        assert all(any(all(a <= b for a, b in zip(m, s, strict=True)) for s in said) for m in measured)
        assert max(map(sum, measured)) == max(map(sum, said)), (rank, said)


def test_interleaved_takes_whole_rounds_only() -> None:
    takes = BY_NAME["Interleaved1F1B"].takes
    for ranks, microbatches in [(4, 8), (4, 10), (4, 9), (4, 3), (4, 15)]:
        try:
            orders(BY_NAME["Interleaved1F1B"], ranks, microbatches)
        except ValueError:
            assert not takes(ranks, microbatches)
        else:
            assert takes(ranks, microbatches)


@pytest.mark.parametrize(("name", "idle"), [("1F1B", 3 / 11), ("Interleaved1F1B", 3 / 19), ("ZBVZeroBubble", 3 / 51)])
def test_idle_time_is_as_published(name: str, idle: float) -> None:
    """Of four ranks and eight micro-batches, with three passes of a second in each stage; docs/benchmarks.md has what
    was measured."""
    schedule = BY_NAME[name]
    waits = 3 * schedule.idle(1.0, 1.0, 1.0)
    assert waits / (8 * schedule.each * 3 + waits) == pytest.approx(idle)
