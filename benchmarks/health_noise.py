"""Healthy runs that are simulated: losses, norms, step times, memory, links and data, as noisy as real ones are."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import exp, log

import torch

from lightning_bharat.health.drift import DriftDetector
from lightning_bharat.health.leak import LeakDetector
from lightning_bharat.health.links import LinkDetector, Tried, partner
from lightning_bharat.health.spike import SpikeDetector
from lightning_bharat.health.straggler import StragglerDetector

RANKS = 8
STEP = 0.05  # seconds


def student(draw: random.Random, freedom: float) -> float:
    """Of Student's distribution, whose tail is the heavier the fewer degrees of freedom it has."""
    return draw.gauss(0, 1) / draw.gammavariate(freedom / 2, 2 / freedom) ** 0.5


def loss(draw: random.Random, steps: int) -> int:
    """Falls like those of language models, with noise that shrinks and five degrees of freedom."""
    detector, found = SpikeDetector(), 0
    for i in range(steps):
        value = 2.5 + 7 * (1 + i / 100) ** -0.6 + (0.03 + 0.2 * exp(-i / 1000)) * student(draw, 5)
        found += detector.look(value) is not None
    return found


def gradient_norm(draw: random.Random, steps: int) -> int:
    """Falls after the warm-up; its logarithm, of which spikes are looked for, has heavy tails, and a memory."""
    detector, found, memory = SpikeDetector(), 0, 0.0
    for i in range(steps):
        memory = 0.9 * memory + 0.05 * student(draw, 5)
        norm = (0.3 + 3 * exp(-i / 300)) * exp(memory + 0.1 * student(draw, 6))
        found += detector.look(log(norm)) is not None
    return found


def straggler(draw: random.Random, steps: int) -> int:
    """Step times of eight ranks with Pareto's tail, in windows of ten seconds."""
    detector, found, a_window = StragglerDetector(), 0, round(10 / STEP)
    hosts = dict.fromkeys(range(RANKS), "host")
    speeds = [1 + 0.05 * draw.random() for _ in range(RANKS)]
    for _ in range(steps // a_window):
        work = {
            rank: sum(STEP * speed * (0.9 + 0.1 * draw.paretovariate(1.8)) for _ in range(a_window)) / a_window
            for rank, speed in enumerate(speeds)
        }
        found += len(detector.look(work, hosts))
    return found


def leak(draw: random.Random, steps: int) -> int:
    """A process that starts up, fills a cache, and holds more at some moments, looked at once a second."""
    detector, found = LeakDetector(), 0
    for second in range(round(steps * STEP)):
        used = 2e9 + 6e8 * (1 - exp(-second / 30)) + 2e8 * draw.random() + 5e8 * (draw.random() < 0.05)
        found += detector.look(used) is not None
    return found


def link(draw: random.Random, steps: int) -> int:
    """All pairs of eight ranks, one turn in twenty seconds; one try in fifty takes ten to a hundred times as long."""
    detector, found = LinkDetector(), 0
    hosts = dict.fromkeys(range(RANKS), "host")
    for turn in range(max(RANKS, round(steps * STEP / 20))):
        pairs = [(a, b) for a in range(RANKS) if (b := partner(a, RANKS, turn)) is not None and a < b]
        took = [
            2e-3 * exp(0.3 * draw.gauss(0, 1)) * (draw.uniform(10, 100) if draw.random() < 0.02 else 1) for _ in pairs
        ]
        found += len(detector.look([Tried(a, b, t) for (a, b), t in zip(pairs, took, strict=True)], hosts))
    return found


def drift(draw: random.Random, steps: int) -> int:
    """Batches of four documents, each about something else."""
    detector, found = DriftDetector(), 0
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    topics = torch.rand(40, 512, generator=generator).pow(6)
    for _ in range(steps):
        about = torch.randint(40, (4,), generator=generator)
        ids = torch.multinomial(topics[about], 128, replacement=True, generator=generator)
        length = torch.randint(64, 128, (4, 1), generator=generator)
        labels = torch.where(torch.arange(128) < length, ids, -100)
        found += len(detector.look({"input_ids": ids, "labels": labels}))
    return found


RUNS: dict[str, Callable[[random.Random, int], int]] = {
    run.__name__.replace("_", " "): run for run in (loss, gradient_norm, straggler, leak, link, drift)
}


def false_alarms(steps: int, seeds: int) -> dict[str, list[int]]:
    """How many each detector gives in each of ``seeds`` healthy runs of ``steps`` steps."""
    return {name: [run(random.Random(f"{name}/{seed}"), steps) for seed in range(seeds)] for name, run in RUNS.items()}
