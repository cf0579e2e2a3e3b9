"""An unchanged module over pipeline stages is one process in float64 to 1e-9, gradients included."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bharat.strategies.schedule import KINDS
from tests.modules import zoo
from tests.pipelines import DEEP
from tests.strategies.test_hybrid import compare

ALL = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 3, "last": 2}


@pytest.mark.parametrize("module", [name for name in zoo() if name != "stack"])
def test_two_stages(module: str) -> None:
    compare(module, 2, {"pipeline_parallel_size": 2}, **ALL)


@pytest.mark.parametrize("module", DEEP)
def test_ways_to_write_a_model(module: str) -> None:
    compare(module, 2, {"pipeline_parallel_size": 2, "schedule": "Interleaved1F1B"}, **ALL)


@pytest.mark.parametrize("schedule", KINDS)
def test_schedules(schedule: str) -> None:
    compare("deep", 2, {"pipeline_parallel_size": 2, "schedule": schedule}, **ALL)


LAYOUTS: dict[str, dict[str, Any]] = {
    "pipeline 4": {"pipeline_parallel_size": 4},
    "tensor 2 × pipeline 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "data 2 × pipeline 2": {"pipeline_parallel_size": 2},
}


ON_EACH = [(layout, "1F1B") for layout in LAYOUTS] + [(layout, "ZBVZeroBubble") for layout in [*LAYOUTS][1:]]


@pytest.mark.parametrize(("layout", "schedule"), ON_EACH)
def test_layouts(layout: str, schedule: str) -> None:
    compare("deep", 4, {**LAYOUTS[layout], "schedule": schedule}, **ALL)
