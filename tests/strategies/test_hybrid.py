"""An unchanged module over data ranks is one process: losses, gradients, norms, logged values, in float64 to 1e-9."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.modules import Result, assert_equal, fit, zoo
from tests.ranks import run_ranks


@cache
def one_process(module: str, **options: Any) -> Result:
    return run_ranks(_fit, 1, module, None, options)[0]


def _fit(module: Any, strategy: dict[str, Any] | None, options: dict[str, Any]) -> Result:
    return fit(module, strategy, **options)


def compare(module: str, ranks: int, strategy: dict[str, Any], **options: Any) -> list[Result]:
    expected = one_process(module, **options)
    results = run_ranks(_fit, ranks, module, strategy, options)
    for found in results:
        assert_equal(found, expected)
    return results


@pytest.mark.parametrize("module", zoo())
def test_two_data_ranks_equal_one_process(module: str) -> None:
    compare(module, 2, {}, gradient_clip_val=0.5, last=2)


@pytest.mark.parametrize("module", ["nano", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {"reshard_after_forward": False},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"offload": True},
    ],
    ids=str,
)
def test_each_option_alone(module: str, options: dict[str, Any]) -> None:
    compare(module, 2, options, gradient_clip_val=0.5, last=2)


@pytest.mark.parametrize("module", zoo())
def test_two_tensor_ranks_equal_one_process(module: str) -> None:
    compare(module, 2, {"tensor_parallel_size": 2}, gradient_clip_val=0.5, last=2)


@pytest.mark.parametrize("module", zoo())
def test_data_and_tensor_ranks_equal_one_process(module: str) -> None:
    options: dict[str, Any] = {"tensor_parallel_size": 2}
    if module != "stack":
        options |= {"activation_checkpointing": "full", "token_weighted": True}
    compare(module, 4, options, gradient_clip_val=0.5, accumulate_grad_batches=2)


def test_copies_of_shards() -> None:
    compare("nano", 4, {"replicate_size": 2}, gradient_clip_val=0.5)


def test_value_clipping() -> None:
    compare("nano", 2, {"tensor_parallel_size": 2}, gradient_clip_val=0.01, gradient_clip_algorithm="value")


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ragged_labels_weighted_by_tokens(accumulate: int, tensor: int) -> None:
    """Weights equal those of one process that sees each window as one batch; logged losses are means of means."""
    expected = one_process("nano", ragged=True, batch=8 * accumulate)
    strategy = {"token_weighted": True, "tensor_parallel_size": tensor}
    options = {"ragged": True, "accumulate_grad_batches": accumulate, "batches": 4 * accumulate}
    for found in run_ranks(_fit, 2 * tensor, "nano", strategy, options):
        for name, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-7, msg=name)
        norms = [norm for _, norm in found.seen][accumulate - 1 :: accumulate]
        assert norms == pytest.approx([norm for _, norm in expected.seen], rel=1e-9)
