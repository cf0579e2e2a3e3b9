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
    """A module's factory, what ``fit`` takes besides, and whether it is also run on data × tensor ranks."""

    module: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    both: bool = True


def places(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """(name, layout) of all runs."""
    return [(name, layout) for layout in LAYOUTS for name in _on(layout, cases)]


def _on(layout: str, cases: Mapping[str, Case]) -> list[str]:
    return [name for name, case in cases.items() if case.both or "×" not in layout]


def check(cases: Mapping[str, Case], name: str, layout: str) -> None:
    """Compare the case ``name`` of the calling test's module on ``layout`` with one process."""
    where = cases[name].module.__module__
    expected = _run(where, "")[0][name]
    for results in _run(where, layout):
        assert_equal(results[name], expected)


@cache
def _run(where: str, layout: str) -> list[dict[str, Result]]:
    """What each rank found, of all cases of a test's module."""
    return run_ranks(_all, LAYOUTS[layout][0] if layout else 1, where, layout, timeout=90)


def _all(where: str, layout: str) -> dict[str, Result]:
    cases = importlib.import_module(where).CASES
    return {name: run(cases[name], LAYOUTS[layout][1] if layout else None) for name in _on(layout, cases)}


def run(case: Case, strategy: dict[str, Any] | None) -> Result:
    """On the ranks that call it."""
    return fit(case.module, strategy, **{"steps": 5, "batches": 3, "limit_val_batches": 1, **case.options})
