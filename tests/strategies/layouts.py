"""Many small trainings in one start of ranks, each compared with plain Lightning on one process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.modules import Result, assert_equal, fit
from tests.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Layers(nn.Module):
    """Small, with all there is: blocks that are gathered and cut, a block's norm that is not cut, and the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), nn.ModuleList(Block(8) for _ in range(2))
        self.scale, self.head = nn.Parameter(torch.ones(())), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * self.scale


@dataclass(frozen=True)
class Case:
    """A module's factory, and what ``fit`` takes besides."""

    module: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def check(cases: Mapping[str, Case], name: str, layout: str) -> None:
    """Compare the case ``name`` of the calling test's module on ``layout`` with one process."""
    where = cases[name].module.__module__
    expected = _run(where, "")[0][name]
    for results in _run(where, layout):
        assert_equal(results[name], expected)


@cache
def _run(where: str, layout: str) -> list[dict[str, Result]]:
    """What each rank found, of all cases of a test's module."""
    ranks, strategy = LAYOUTS.get(layout, (1, None))
    return run_ranks(_all, ranks, where, strategy, timeout=90)


def _all(where: str, strategy: dict[str, Any] | None) -> dict[str, Result]:
    return {name: _named(where, name, strategy) for name in importlib.import_module(where).CASES}


def _named(where: str, name: str, strategy: dict[str, Any] | None) -> Result:
    case = importlib.import_module(where).CASES[name]
    return fit(case.module, strategy, **{"steps": 6, "batches": 3, **case.options})
