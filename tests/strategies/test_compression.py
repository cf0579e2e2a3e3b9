"""Gradients that copies average in int8: a quarter of the bytes, the same on all ranks, and nothing lost for good."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_bharat import HybridStrategy
from lightning_bharat.strategies.compression import BLOCK, CompressedGroup, Quantized
from tests.modules import Result, fit
from tests.ranks import run_ranks

INT8 = {"replicate_size": 2, "gradient_compression": "int8"}


def gradient(rank: int, step: int, numbers: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(numbers, generator=draw) * torch.logspace(-4, 2, numbers)


def _averages(numbers: int, steps: int, operation: str) -> tuple[list[torch.Tensor], int]:
    dist.init_process_group("gloo")
    group, found = CompressedGroup(dist.group.WORLD), []
    for step in range(steps):
        tensor = gradient(dist.get_rank(), step, numbers)
        group.allreduce([tensor], SimpleNamespace(reduceOp=getattr(dist.ReduceOp, operation)))
        found.append(tensor)
    sent = group.sent // steps
    dist.destroy_process_group()
    return found, sent


@pytest.mark.parametrize(("ranks", "numbers"), [(2, 1), (2, 5000), (3, 5000)])
def test_each_average_is_near_and_their_sum_over_steps_stays_so(ranks: int, numbers: int) -> None:
    steps = 12
    results = run_ranks(_averages, ranks, numbers, steps, "AVG")
    found, sent = results[0]
    assert all(torch.equal(a, b) for others, _ in results for a, b in zip(found, others, strict=True))
    exact = [sum(gradient(rank, step, numbers) for rank in range(ranks)) / ranks for step in range(steps)]
    near = 3 * torch.stack(exact).abs().max() / 127
    assert (found[0] - exact[0]).abs().max() <= near
    assert (sum(found) - sum(exact)).abs().max() <= near  # of twelve steps: nothing adds up
    if numbers > 1:
        plain = 2 * 4 * numbers / ranks  # bytes to each other rank, of a ring in float32
        assert 0.25 < sent / plain < 0.3
    assert torch.allclose(run_ranks(_averages, ranks, numbers, 1, "SUM")[0][0][0], found[0] * ranks)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_lost(wrong: float) -> None:
    x = torch.ones(2, BLOCK)
    x[0, 3] = wrong
    numbers = Quantized.of(x).numbers()
    assert not numbers[0].isfinite().any() and torch.equal(numbers[1], x[1])


def test_zeros_stay_zeros() -> None:
    assert not Quantized.of(torch.zeros(1, BLOCK)).numbers().any()


def _trained(strategy: dict[str, Any] | None) -> Result:
    return fit("nano", strategy, 10, accumulate_grad_batches=2, gradient_clip_val=0.5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_training_follows_one_process(ranks: int) -> None:
    expected = run_ranks(_trained, 1, None)[0]
    results = run_ranks(_trained, ranks, INT8)
    for found in results:
        losses = [torch.tensor(run.seen)[:, 0] for run in (found, expected)]
        assert 0 < (losses[0] - losses[1]).abs().max() < 5e-3
        for name, gradient in expected.gradients.items():
            assert (found.gradients[name] - gradient).abs().max() <= 0.05 * gradient.abs().max(), name
        for name, weight in results[0].weights.items():
            assert torch.equal(found.weights[name], weight), name
    assert "gradient_compression: 2 copies average gradients in int8" in results[0].explain


def test_refused_without_copies() -> None:
    with pytest.raises(ValueError, match=r"write replicate_size=<hosts> too"):
        HybridStrategy(gradient_compression="int8")
