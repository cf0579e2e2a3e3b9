"""An unchanged module over data ranks is one process: losses, gradients, norms, logged values, in float64 to 1e-9."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

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
    everything = {"tensor_parallel_size": 2, "activation_checkpointing": "full", "token_weighted": module != "stack"}
    compare(module, 4, everything, gradient_clip_val=0.5, last=2, accumulate_grad_batches=2)


def test_copies_of_shards() -> None:
    compare("nano", 4, {"replicate_size": 2}, gradient_clip_val=0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ragged_labels_weighted_by_tokens(accumulate: int) -> None:
    compare("nano", 2, {"token_weighted": True}, ragged=True, accumulate_grad_batches=accumulate)
