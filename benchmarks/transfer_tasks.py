"""Families of tasks for transfer: an earlier task and a new one that is like it, and earlier ones that are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from optuna import Trial
from torch import nn
from torch.nn import functional as F

from benchmarks.sampler_tasks import branin_at, hartmann6_at

Array = np.ndarray
Objective = Callable[[Trial], float]


@dataclass(frozen=True)
class Family:
    """Tasks over one space.

    Attributes:
        make: the task of a seed, and its minimum (0 where nobody knows it).
        space: asks a trial for a point, as numbers from 0 to 1.
        trials: of a study.
    """

    make: Callable[[int], tuple[Objective, float]]
    space: Callable[[Trial], Array]
    trials: int = 50


def _cube(size: int) -> Callable[[Trial], Array]:
    return lambda trial: np.array([trial.suggest_float(f"x{i}", 0, 1) for i in range(size)])


def _of_family(seed: int, family: int) -> np.random.RandomState:
    return np.random.RandomState([seed, family])


def quadratic(seed: int) -> tuple[Objective, float]:
    """A bowl in four numbers. Two seeds of one hundred have centres that are some 0.1 apart in each, and other scales
    and curvatures."""
    common, own, ask = _of_family(seed // 100, 1), _of_family(seed, 2), _cube(4)
    centre = common.uniform(0.2, 0.8, 4) + own.uniform(-0.1, 0.1, 4)
    weights = common.uniform(0.3, 3, 4) * own.uniform(0.7, 1.4, 4) * 10 ** own.uniform(-2, 2)
    return lambda trial: float(weights @ (ask(trial) - centre) ** 2), 0.0


def hartmann6(seed: int) -> tuple[Objective, float]:
    """Hartmann 6, moved by up to 0.1 of the range in each of its numbers, and on another scale."""
    own, ask = _of_family(seed, 3), _cube(6)
    shift, scale = own.uniform(-0.1, 0.1, 6), 10 ** own.uniform(-2, 2)
    return lambda trial: scale * (hartmann6_at(ask(trial) - shift) + 3.32236801), 0.0


def branin(seed: int) -> tuple[Objective, float]:
    """Branin, moved by up to 0.1 of the range, and on another scale."""
    own, ask = _of_family(seed, 4), _cube(2)
    shift, scale = own.uniform(-0.1, 0.1, 2), 10 ** own.uniform(-2, 2)

    def objective(trial: Trial) -> float:
        x, y = ask(trial) - shift
        return float(scale * (branin_at(x, y) - 0.39788736))

    return objective, 0.0


def _settings(trial: Trial) -> Array:
    rate, decay = trial.suggest_float("lr", 1e-4, 1, log=True), trial.suggest_float("decay", 1e-5, 1e-1, log=True)
    width, momentum = trial.suggest_int("width", 4, 64, log=True), trial.suggest_float("momentum", 0, 0.98)
    act = trial.suggest_categorical("act", ["relu", "tanh", "sigmoid"])
    where = [math.log10(rate) / 4 + 1, math.log10(decay) / 4 + 1.25, math.log2(width) / 4 - 0.5, momentum / 0.98]
    return np.array([*where, ["relu", "tanh", "sigmoid"].index(act) / 2])


def network(seed: int) -> tuple[Objective, float]:
    """A small network, by SGD, on points that a random network of the seed puts into classes; seeds have other numbers
    of classes, inputs and points. Its value is the loss on points that it has not seen."""
    own = _of_family(seed, 5)
    inputs, classes, rows = int(own.choice([8, 12, 16])), int(own.choice([3, 4, 6])), int(own.choice([192, 256, 384]))
    draw = torch.Generator().manual_seed(seed)
    x, first, second = (torch.randn(*s, generator=draw) for s in ((2 * rows, inputs), (inputs, 16), (16, classes)))
    y = (torch.tanh(1.5 * x @ first / inputs**0.5) @ second).argmax(1)
    activations = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}

    def objective(trial: Trial) -> float:
        _settings(trial)
        given = trial.params
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(inputs, given["width"]), activations[given["act"]](), nn.Linear(given["width"], classes)
        )
        sgd = torch.optim.SGD(net.parameters(), given["lr"], momentum=given["momentum"], weight_decay=given["decay"])
        for _ in range(3):
            for start in range(0, rows, 32):
                sgd.zero_grad()
                F.cross_entropy(net(x[start : start + 32]), y[start : start + 32]).backward()
                sgd.step()
        with torch.no_grad():
            loss = float(F.cross_entropy(net(x[rows:]), y[rows:]))
        return min(loss, 20.0) if loss == loss else 20.0

    return objective, 0.0


FAMILIES = {
    "quadratic": Family(quadratic, _cube(4)),
    "hartmann6": Family(hartmann6, _cube(6)),
    "branin": Family(branin, _cube(2)),
    "network": Family(network, _settings, 30),
}


def waves(family: Family, seed: int) -> Objective:
    """A smooth function of the family's space that has nothing to do with its tasks: a sum of waves."""
    own = _of_family(seed, 6)
    made: list[Array] = []

    def objective(trial: Trial) -> float:
        x = family.space(trial)
        if not made:
            made.extend((own.normal(0, 4, (20, len(x))), own.uniform(0, 2 * np.pi, 20), own.normal(0, 1, 20)))
        return float(made[2] @ np.cos(made[0] @ x + made[1]))

    return objective


def opposite(family: Family, seed: int) -> Objective:
    """The family's task, turned around: its best points are the worst."""
    objective, _ = family.make(seed)
    return lambda trial: -objective(trial)
