"""What is unusual is found soon, and what is usual is not called so."""

from __future__ import annotations

import random
from math import exp

import pytest
import torch

from lightning_bharat.health.drift import BLOCK, EVERY, REFERENCE, DriftDetector
from lightning_bharat.health.leak import SAMPLES, WINDOWS, LeakDetector
from lightning_bharat.health.spike import RENEWED, SpikeDetector
from lightning_bharat.health.straggler import WINDOWS as ROUNDS
from lightning_bharat.health.straggler import StragglerDetector

MIB = 2**20


BATCHES = BLOCK * EVERY


def losses(seed: int, steps: int, tail: float) -> list[float]:
    """A loss that falls with noise that shrinks; ``tail``: degrees of freedom of Student's t."""
    draw = random.Random(seed)
    student = [draw.gauss(0, 1) / (draw.gammavariate(tail / 2, 2 / tail)) ** 0.5 for _ in range(steps)]
    return [2 + 6 * exp(-i / 800) + (0.05 + 0.3 * exp(-i / 500)) * t for i, t in enumerate(student)]


@pytest.mark.parametrize("tail", [5, 30])
def test_noise_is_no_spike(tail: float) -> None:
    detector = SpikeDetector()
    assert [i for i, loss in enumerate(losses(1, 4000, tail)) if detector.look(loss) is not None] == []


def test_a_spike_is_found_at_once_and_a_new_level_is_learned() -> None:
    detector = SpikeDetector()
    for loss in losses(2, 500, 30):
        detector.look(loss)
    usual, limit = detector.usual(), detector.limit()
    assert detector.look(usual + 3) > limit
    assert detector.look(usual) is None
    found = [detector.look(usual + 3) for _ in range(100)]
    assert all(far is not None for far in found[:16]) and not any(found[16:])
    assert detector.look(float("nan")) is None


def test_a_spike_is_found_however_old_the_last_look_at_the_window_is() -> None:
    for since in range(2 * RENEWED):
        detector = SpikeDetector()
        for loss in [*losses(2, 500, 30), *[5.0] * since]:  # which is below the median, and needs no look
            detector.look(loss)
        assert detector.look(detector.usual() + 10) is not None


def test_memory_that_only_grows_is_a_leak() -> None:
    detector, draw = LeakDetector(), random.Random(3)
    grown = [1000 * MIB + i * MIB + draw.random() * 300 * MIB * (i % 3) for i in range(200)]
    found = [i for i, used in enumerate(grown) if detector.look(used) is not None]
    assert found and found[0] < SAMPLES * (WINDOWS + 1)


def test_caches_and_loads_are_none() -> None:
    for used in (
        lambda i: 1000 * MIB + 500 * MIB * (1 - exp(-i / 40)),  # a cache that fills up
        lambda i: 1000 * MIB + 400 * MIB * (i // 150 % 2),  # a load that comes and goes
        lambda i: 1000 * MIB + 200 * MIB * (i > 100),  # something made once
    ):
        detector = LeakDetector()
        assert not [i for i in range(1000) if detector.look(used(i)) is not None]


def test_a_straggler_among_ranks_and_of_two() -> None:
    hosts = dict.fromkeys(range(8), "host")
    for ranks in (2, 8):
        detector, draw = StragglerDetector(), random.Random(ranks)
        for _ in range(50):
            assert not detector.look({rank: 0.05 * (1 + 0.1 * draw.random()) for rank in range(ranks)}, hosts)
        found = [
            detector.look({rank: 0.05 * (2 if rank == 1 else 1) for rank in range(ranks)}, hosts) for _ in range(6)
        ]
        assert [len(each) for each in found] == [0] * (ROUNDS - 1) + [1] + [0] * (6 - ROUNDS)
        assert found[ROUNDS - 1][0].rank == 1
        assert "2.0 times as long as the median of the others (50.0 ms)" in found[ROUNDS - 1][0].message


def _tokens(generator: torch.Generator, shift: int = 0, ignored: float = 0.1) -> dict[str, torch.Tensor]:
    ids = torch.poisson(torch.full((8, 64), 20.0), generator=generator).long() + shift
    labels = torch.where(torch.rand(8, 64, generator=generator) < ignored, -100, ids)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("change", ["nothing", "tokens", "share of labels"])
def test_drift(change: str) -> None:
    generator, detector, found = torch.Generator().manual_seed(4), DriftDetector(), []
    for i in range(BATCHES * (REFERENCE + 30)):
        after = i >= BATCHES * (REFERENCE + 10)
        shift = 6 if after and change == "tokens" else 0
        ignored = 0.4 if after and change == "share of labels" else 0.1
        found += [(i, words) for words in detector.look(_tokens(generator, shift, ignored))]
    if change == "nothing":
        assert not found
    else:
        ((at, words),) = found
        assert at < BATCHES * (REFERENCE + 10) + 2 * BATCHES and f"the {change}" in words


def test_drift_of_numbers() -> None:
    generator, detector = torch.Generator().manual_seed(5), DriftDetector()
    draw = [torch.randn(16, 8, generator=generator) for _ in range(BATCHES * (REFERENCE + 4))]
    assert not [words for x in draw for words in detector.look((x, torch.zeros(16, dtype=torch.int64)))]
    found = [words for x in draw[: 2 * BATCHES] for words in detector.look((3 * x, torch.zeros(16, dtype=torch.int64)))]
    assert len(found) == 1 and "mean square" in found[0]
