"""Gradients that data ranks average in another type: rounded once on each rank, added up and kept in their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bharat import HybridStrategy
from tests.modules import Result, fit
from tests.ranks import run_ranks

LOW = {"reduce_dtype": "bfloat16"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "replicate 2 × shard 2": (4, {"replicate_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
}


def _runs(strategy: dict[str, Any] | None) -> list[Result]:
    return [fit("nano", strategy, 4, batch=16), fit("nano", strategy, 4, batch=16, accumulate_grad_batches=2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_three_digits_and_weights_follow(layout: str) -> None:
    ranks, options = LAYOUTS[layout]
    expected = run_ranks(_runs, 1, None)[0]
    for run, whole in zip(run_ranks(_runs, ranks, {**options, **LOW})[0], expected, strict=True):
        for name, gradient in whole.gradients.items():
            found = run.gradients[name]
            largest = float(gradient.abs().max())
            assert 0 < float((found - gradient).abs().max()) <= largest / 100, name
        assert abs(run.seen[-1][0] - whole.seen[-1][0]) < 1e-2
        assert "data ranks average gradients in bfloat16" in run.explain


def test_one_batch_s_gradients_are_bfloat16_and_a_window_s_are_added_up_in_their_own_type() -> None:
    one, window = run_ranks(_runs, 2, LOW)[0]
    assert all(torch.equal(g, g.bfloat16().double()) for g in one.gradients.values())
    assert not any(torch.equal(g, g.bfloat16().double()) for n, g in window.gradients.items() if g.numel() > 1000)


def _bfloat16(strategy: dict[str, Any]) -> Result:
    return fit("nano", strategy, 1, batch=16, precision="bf16-true")


def test_bfloat16_gradients_may_be_averaged_in_float32() -> None:
    """On four ranks, where a sum in bfloat16 rounds more than once."""
    better, worse = (run_ranks(_bfloat16, 4, options)[0] for options in ({"reduce_dtype": "float32"}, {}))
    assert any(not torch.equal(better.gradients[n], worse.gradients[n]) for n in better.gradients)
    assert all(g.dtype == torch.bfloat16 for g in better.gradients.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reduce_dtype": "float16"}, "reduce_dtype='float16': write one of bfloat16, float32, or None"),
        ({**LOW, "pipeline_parallel_size": 2}, "gradients of micro-batches would be added up in that type"),
    ],
    ids=str,
)
def test_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HybridStrategy(**arguments)
