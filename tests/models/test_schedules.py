"""Schedules against their formulas, written out here once more, and through a resume."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from lightning_bharat.models import InverseSquareRoot, Warmup, WarmupCosine, WarmupLinear, WarmupStableDecay

RATES = (0.5, 2.0)  # of two groups


def optimizer() -> SGD:
    return SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in RATES])


def rates(schedule: LRScheduler, steps: int) -> list[list[float]]:
    """What the optimizer has at each of the steps to come."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


def warm(step: int, then: float) -> float:
    return (step + 1) / 5 if step < 4 else then


CASES: dict[str, tuple[Callable[[SGD], LRScheduler], Callable[[int], float]]] = {
    "warmup": (lambda o: Warmup(o, 4), lambda s: warm(s, 1.0)),
    "cosine": (
        lambda o: WarmupCosine(o, 4, 24, final=0.1),
        lambda s: warm(s, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(s - 4, 20) / 20))),
    ),
    "linear": (lambda o: WarmupLinear(o, 4, 24, final=0.2), lambda s: warm(s, max(1 - 0.8 * (s - 4) / 20, 0.2))),
    "stable, then root": (
        lambda o: WarmupStableDecay(o, 4, 24, decay_steps=10),
        lambda s: warm(s, 1.0 if s < 14 else 1 - math.sqrt(min((s - 14) / 10, 1))),
    ),
    "stable, then line": (
        lambda o: WarmupStableDecay(o, 4, 24, shape="linear", final=0.5),
        lambda s: warm(s, 1.0 if s < 20 else max(1 - 0.5 * (s - 20) / 4, 0.5)),
    ),
    "inverse root": (lambda o: InverseSquareRoot(o, 4), lambda s: min((s + 1) / 5, math.sqrt(5 / (s + 1)))),
}


@pytest.mark.parametrize("name", CASES)
def test_rates_are_those_of_the_formula(name: str) -> None:
    make, formula = CASES[name]
    found = rates(make(optimizer()), 30)
    assert found == [pytest.approx([rate * formula(step) for rate in RATES], rel=1e-12) for step in range(30)]


@pytest.mark.parametrize("name", CASES)
def test_resumed_rates_have_the_same_bits(name: str) -> None:
    make, _ = CASES[name]
    undisturbed = rates(make(optimizer()), 30)
    first = make(optimizer())
    rates(first, 11)
    second = make(optimizer())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert rates(second, 19) == undisturbed[11:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: WarmupCosine(o, -1, 10), "warmup_steps=-1 is negative"),
        (lambda o: WarmupLinear(o, 10, 10), "total_steps=10 must be more than warmup_steps=10"),
        (lambda o: WarmupCosine(o, 1, 10, final=1.5), r"final=1.5 is the last rate's share"),
        (lambda o: WarmupStableDecay(o, 5, 10, decay_steps=6), "decay_steps=6 must be from 1 to .* = 5"),
        (lambda o: WarmupStableDecay(o, 1, 10, shape="cube"), "shape='cube' is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[SGD], LRScheduler], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optimizer())
