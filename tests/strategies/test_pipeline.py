"""An unchanged module over pipeline stages is one process in float64 to 1e-9, gradients included."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bharat.strategies.schedule import KINDS
from tests.modules import zoo
from tests.pipelines import DEEP
from tests.strategies.together import Run, Together

ALL: dict[str, Any] = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 3, "last": 2, "steps": 5}
STAGES: dict[str, Any] = {"pipeline_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pipeline 4": {"pipeline_parallel_size": 4},
    "tensor 2 × pipeline 2": {**STAGES, "tensor_parallel_size": 2},
    "data 2 × pipeline 2": STAGES,
}
ON_EACH = [(layout, "1F1B") for layout in LAYOUTS] + [(layout, "ZBVZeroBubble") for layout in [*LAYOUTS][1:]]

MODULES = Together(2, {name: Run(name, STAGES, ALL) for name in zoo() if name != "stack"})
WRITTEN = Together(2, {name: Run(name, {**STAGES, "schedule": "Interleaved1F1B"}, ALL) for name in DEEP})
SCHEDULES = Together(2, {name: Run("deep", {**STAGES, "schedule": name}, ALL) for name in KINDS})
ON_FOUR = Together(
    4,
    {f"{layout}, {name}": Run("deep", {**LAYOUTS[layout], "schedule": name}, ALL) for layout, name in ON_EACH},
)


@pytest.mark.parametrize("module", MODULES.runs)
def test_two_stages(module: str) -> None:
    MODULES.check(module)


@pytest.mark.parametrize("module", WRITTEN.runs)
def test_ways_to_write_a_model(module: str) -> None:
    WRITTEN.check(module)


@pytest.mark.parametrize("schedule", SCHEDULES.runs)
def test_schedules(schedule: str) -> None:
    SCHEDULES.check(schedule)


@pytest.mark.parametrize("name", ON_FOUR.runs)
def test_layouts(name: str) -> None:
    ON_FOUR.check(name)
