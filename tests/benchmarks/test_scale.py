"""benchmarks/scale.py: cuts proven on a narrow decoder are those of a wide one, and fake ranks hold what is planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import scale
from lightning_bharat import Layout
from lightning_bharat.models import GPTConfig
from lightning_bharat.plan.cluster import Cluster, Link
from lightning_bharat.plan.estimate import Estimate
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.memory import Memory
from lightning_bharat.plan.schedules import NONE, SCHEDULES, Schedule
from lightning_bharat.plan.share import Setting
from tests.ranks import run_ranks

DENSE = scale.Model(
    GPTConfig(96, 64, num_hidden_layers=8, num_attention_heads=4),
    GPTConfig(96, 16, num_hidden_layers=2, num_attention_heads=4),
)
EXPERTS: dict[str, Any] = {"num_shared_experts": 1, "scoring_func": "sigmoid", "bias_update_speed": 0.001}
MIXTURE = scale.Model(
    GPTConfig(96, 64, None, 4, 4, num_experts=8, moe_intermediate_size=32, **EXPERTS),
    GPTConfig(96, 16, None, 2, 4, num_experts=4, moe_intermediate_size=8, **EXPERTS),
    contexts=(1, 2),
)


@pytest.mark.parametrize("model", [DENSE, MIXTURE])
def test_widened_cuts_are_those_that_are_proven(model: scale.Model) -> None:
    (wide, batch), (narrow, small) = scale.on_meta(model.wide), scale.on_meta(model.narrow)
    proven = find_plan(narrow, scale.loss, small, 2)
    found = scale.widened(proven, narrow, wide, find_plan(wide, scale.loss, batch, 1))
    expected = find_plan(wide, scale.loss, batch, 2)
    assert replace(found, sequence="") == replace(expected, sequence="")
    assert bool(found.sequence) == bool(expected.sequence)  # why not: the reason has shapes in it


def of_ranks(model: scale.Model, layout: Layout, schedule: Schedule) -> list[tuple[Memory, dict[str, int]]]:
    """For the first data rank of each stage, what is planned and what its tensors are."""
    share = scale.shares(replace(model, contexts=(layout.context,)), [layout.tensor])[layout.tensor, layout.context]
    setting = Setting(layout, 4, 1, schedule)
    estimate = Estimate(share, Cluster(1, layout.devices, 2**30, 1e9, Link(1e9, 0.0)))
    ranks = [(stage, layout.rank(pipeline=stage, tensor=layout.tensor - 1)) for stage in range(layout.pipeline)]
    return [
        (estimate.static(setting, stage), scale.cut(setting, share.plan, rank, model.wide)) for stage, rank in ranks
    ]


def found(layouts: list[tuple[Layout, str]]) -> list[list[tuple[Memory, dict[str, int]]]]:
    by_name = {schedule.name: schedule for schedule in (NONE, *SCHEDULES)}
    return [of_ranks(MIXTURE if layout.expert > 1 else DENSE, layout, by_name[name]) for layout, name in layouts]


@pytest.mark.timeout(120)
def test_ranks_of_a_large_world_hold_what_is_planned() -> None:
    layouts = [
        (Layout(data=64, replicate=4), ""),
        (Layout(data=16, tensor=2, pipeline=4), "1F1B"),
        (Layout(data=8, tensor=2, pipeline=4, replicate=2), "ZBVZeroBubble"),
        (Layout(data=16, tensor=2, context=2, pipeline=2, expert=4), "1F1B"),
    ]
    for stages in run_ranks(found, 1, layouts, timeout=90)[0]:
        for planned, held in stages:
            assert held == {name: getattr(planned, name) for name in scale.QUANTITIES}
