"""An unchanged module over tensor ranks, and over data × tensor ranks, is one process in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest

from tests.modules import zoo
from tests.strategies.together import Run, Together

TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
TRAINER: dict[str, Any] = {"steps": 6, "gradient_clip_val": 0.3}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sequence_parallel": False},
    {"loss_parallel": False},
    {"activation_checkpointing": "selective"},
    {"offload": True},
    {"replicate_size": 2},
    {"plan": {}},
]


def all_options(module: str) -> Run:
    strategy = {**TENSOR, "reshard_after_forward": True}
    if module != "stack":  # it has no blocks to recompute
        strategy["activation_checkpointing"] = "full"
    return Run(module, strategy, {**TRAINER, "accumulate_grad_batches": 2, "last": 2})


def alone(module: str, options: dict[str, Any]) -> Run:
    if "plan" in options:
        blocks = "model.layers.*" if module == "nano" else "model.model.model.layers.*.mlp"
        ends = ("up", "down") if module == "nano" else ("up_proj", "down_proj")
        options = {"plan": {f"{blocks}.{ends[0]}": "colwise", f"{blocks}.{ends[1]}": "rowwise"}}
        if module == "qwen3":
            options["plan"][f"{blocks}.gate_proj"] = "colwise"
    return Run(module, {**TENSOR, **options}, TRAINER)


ALL = {name: all_options(name) for name in zoo()}
ALONE = {f"{name} {options}": (name, options) for name in ("nano", "qwen3") for options in OPTIONS}
ON_FOUR = {name: alone(*case) for name, case in ALONE.items() if "replicate_size" in case[1]}
ON_TWO = {name: alone(*case) for name, case in ALONE.items() if name not in ON_FOUR}
LAYOUTS = {"tensor 2": Together(2, ALL | ON_TWO), "data 2 × tensor 2": Together(4, ALL | ON_FOUR)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", zoo())
def test_all_options_together(module: str, layout: str) -> None:
    results = LAYOUTS[layout].check(module)
    assert "proven for 2 tensor ranks" in results[0].explain


@pytest.mark.parametrize("name", ALONE)
def test_each_option_alone(name: str) -> None:
    LAYOUTS["data 2 × tensor 2" if name in ON_FOUR else "tensor 2"].check(name)
