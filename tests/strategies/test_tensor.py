"""An unchanged module over tensor ranks, and over data × tensor ranks, is one process in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest

from tests.modules import zoo
from tests.strategies.test_hybrid import compare

LAYOUTS = {"tensor 2": (2, {"tensor_parallel_size": 2}), "data 2 × tensor 2": (4, {"tensor_parallel_size": 2})}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", zoo())
def test_all_options_together(module: str, layout: str) -> None:
    ranks, sizes = LAYOUTS[layout]
    strategy = {**sizes, "reshard_after_forward": True}
    if module != "stack":  # it has no blocks to recompute
        strategy["activation_checkpointing"] = "full"
    results = compare(module, ranks, strategy, gradient_clip_val=0.3, accumulate_grad_batches=2, last=2)
    assert "proven for 2 tensor ranks" in results[0].explain


@pytest.mark.parametrize("module", ["nano", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequence_parallel": False},
        {"loss_parallel": False},
        {"activation_checkpointing": "selective"},
        {"offload": True},
        {"replicate_size": 2},
        {"plan": {}},
    ],
    ids=str,
)
def test_each_option_alone(module: str, options: dict[str, Any]) -> None:
    ranks = 4 if "replicate_size" in options else 2
    if "plan" in options:
        blocks = "model.layers.*" if module == "nano" else "model.model.model.layers.*.mlp"
        ends = ("up", "down") if module == "nano" else ("up_proj", "down_proj")
        options = {"plan": {f"{blocks}.{ends[0]}": "colwise", f"{blocks}.{ends[1]}": "rowwise"}}
        if module == "qwen3":
            options["plan"][f"{blocks}.gate_proj"] = "colwise"
    compare(module, ranks, {"tensor_parallel_size": 2, **options}, gradient_clip_val=0.3)
