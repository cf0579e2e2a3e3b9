"""Stages of a pipeline cost as much as each other, as far as blocks allow."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.partition import balanced, by_cost
from tests.plan.models import MODELS, Nano, batch_of, step


def test_the_dearest_stage_is_the_cheapest_possible() -> None:
    dice = random.Random(0)
    for _ in range(200):
        depth = dice.randint(1, 8)
        stages = dice.randint(1, depth)
        costs = [dice.randint(0, 5) for _ in range(depth)]
        before, after = dice.randint(0, 9), dice.randint(0, 9)
        found = balanced(costs, stages, before, after)
        assert [b.start for b in found] == [0, *(b.stop for b in found[:-1])] and found[-1].stop == depth
        assert all(found)
        if not any(costs):
            costs = [1] * depth
        costs = [costs[0] + before, *costs[1:]]
        costs[-1] += after
        best = min(
            max(sum(costs[a:b]) for a, b in pairwise([0, *ends, depth]))
            for ends in combinations(range(1, depth), stages - 1)
        )
        assert max(sum(costs[b.start : b.stop]) for b in found) == best


def test_without_costs_stages_have_as_many_blocks() -> None:
    assert balanced([0] * 5, 2) in ([range(3), range(3, 5)], [range(2), range(2, 5)])
    assert balanced([0] * 6, 3) == [range(2), range(2, 4), range(4, 6)]


@pytest.mark.parametrize("model", MODELS)
def test_costs_are_those_of_matrix_products(model: str) -> None:
    module = MODELS[model]()
    plan = find_plan(module, step, batch_of(module, 0), 1)
    assert len(plan.costs) == plan.depth + 2
    if model == "nano":
        rows, width, vocabulary = 4 * 32, 48, 96
        attention = 2 * 2 * 4 * 4 * 32 * 32 * 12  # two products of 4 samples with 4 heads
        block = 2 * rows * width * width * 12 + attention
        assert plan.costs == (0, *[block] * 3, 2 * rows * width * vocabulary)


class Wide(nn.Module):
    """A head that costs as much as four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5))
        self.head = nn.Linear(8, 32)


def test_a_dear_head_has_fewer_blocks_on_its_stage() -> None:
    def run(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = module.first(batch["x"])
        for layer in module.layers:
            x = layer(x)
        return F.mse_loss(module.head(x), batch["y"])

    plan = find_plan(Wide(), run, {"x": torch.zeros(4, 8), "y": torch.zeros(4, 32)}, 1)
    assert (plan.costs[0], plan.costs[-1]) == (512, 4 * 512)
    assert by_cost(plan, 2) == [range(4), range(4, 5)]
    assert len(find_plan(Nano(), step, batch_of(Nano(), 0), 1).costs) == 5
