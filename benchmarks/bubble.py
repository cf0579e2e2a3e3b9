"""How much of a pipeline's time no rank works, on blocks that sleep, beside what the schedule itself leaves idle.

    python -m benchmarks.bubble
    python -m benchmarks.bubble --schedule 1F1B --milliseconds 20

A block sleeps as long in its forward pass as in its backward pass of inputs and in that of weights, so that four stages
fit on two cores. The timeline of a real training step gives the bubble. It is compared with what is published: for p
ranks, v stages on each and m micro-batches (p - 1) / (m v + p - 1) of the time (Narayanan et al., 2019 and 2021), and
for DualPipeV (p - 1) (F&B + B - 3 W) in seconds (DeepSeek's DualPipe, 2025; F&B takes as long as both where nothing
overlaps). For the others it is compared with their own order of work, played through as if messages took no time.

The goal is that each bubble is within 10 % of what it is compared with, and that those of the zero-bubble schedules are
below that of 1F1B. Exit code 1: a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bharat import HybridStrategy
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import table
from lightning_bharat.strategies.schedule import KINDS
from lightning_bharat.strategies.timeline import Timeline

RANKS, BLOCKS, MICROBATCHES = 4, 8, 8
TEXTBOOK = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B")
BY_FORMULA = (*TEXTBOOK, "DualPipeV")
ZERO = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
WARM_UP = 2


class Sleep(torch.autograd.Function):
    """Passes on ``x``; sleeps meanwhile, and when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.backward)
        return gradients[0], None, None


class Sleeping(nn.Module):
    """A block whose passes last so many seconds: forward, backward of its input, backward of its weight."""

    def __init__(self, forward: float, inputs: float, weights: float) -> None:
        super().__init__()
        self.seconds, self.weight = (forward, inputs, weights), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        forward, inputs, weights = self.seconds
        return Sleep.apply(x, forward, inputs) * Sleep.apply(self.weight, 0.0, weights)


class Sleepers(L.LightningModule):
    """Blocks in a row; ``seconds`` of each one's three passes."""

    def __init__(self, seconds: Iterable[tuple[float, float, float]]) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(1))  # so that the first block has a backward pass of inputs, too
        self.blocks = nn.ModuleList(Sleeping(*of_block) for of_block in seconds)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch * self.start
        for block in self.blocks:
            x = block(x)
        return x.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Result:
    """One schedule: shares of all ranks' time. ``expected`` is the formula's, or that of the order played through."""

    schedule: str
    measured: float
    expected: float
    step_ms: float

    @property
    def by_formula(self) -> bool:
        """Whether ``expected`` is that of the formula."""
        return self.schedule in BY_FORMULA

    @property
    def apart(self) -> float:
        """Of the measured one from the expected one, relative."""
        return self.measured / self.expected - 1 if self.expected else float("inf")


class Follow(L.Callback):
    """Keeps a timeline of each step after the first ones."""

    def __init__(self) -> None:
        self.timelines: list[Timeline] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx >= WARM_UP:
            trainer.strategy.begin_timeline()  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= WARM_UP:
            self.timelines.append(trainer.strategy.end_timeline())  # type: ignore[attr-defined]


def followed(strategy: HybridStrategy, blocks: Sleepers, microbatches: int, steps: int) -> list[Timeline]:
    """Train ``blocks``; every rank calls it. The timelines of ``steps`` steps after the first ones."""
    follow = Follow()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS,
        max_steps=WARM_UP + steps,
        callbacks=[follow],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(blocks, DataLoader([torch.ones(microbatches, 1, 1)] * (WARM_UP + steps), batch_size=None))
    return follow.timelines


def measure(schedule: str, seconds: float, steps: int) -> Result:
    """Train with ``schedule``; every rank calls it. The median step counts."""
    strategy = HybridStrategy(pipeline_parallel_size=RANKS, schedule=schedule, num_microbatches=MICROBATCHES)
    timelines = followed(strategy, Sleepers([(seconds, seconds, seconds)] * BLOCKS), MICROBATCHES, steps)
    shown = sorted(timelines, key=lambda timeline: timeline.bubble)[len(timelines) // 2]
    milliseconds = 1000 * median(timeline.seconds for timeline in timelines)
    return Result(schedule, shown.bubble, _expected(schedule, shown), milliseconds)


def _expected(schedule: str, timeline: Timeline) -> float:
    if schedule in TEXTBOOK:
        return timeline.textbook
    if schedule == "DualPipeV":  # F = 1, B = 2, W = 1, F&B = 3 sleeps; a micro-batch is 3 sleeps of each of two stages
        idle = (RANKS - 1) * (3 + 2 - 3)
        return idle / (MICROBATCHES * 2 * 3 + idle)
    return timeline.without_waiting


def missed(results: Sequence[Result]) -> Iterator[str]:
    """The goals that are missed, in words."""
    by_name = {result.schedule: result for result in results}
    for result in results:
        if abs(result.apart) > 0.1:
            yield f"{result.schedule}: {result.apart:+.1%} from what was expected"
        if result.schedule in ZERO and "1F1B" in by_name and result.measured >= by_name["1F1B"].measured:
            yield f"{result.schedule}: not below 1F1B"


def report(results: Sequence[Result]) -> str:
    """A table for people, and a line of JSON."""
    head = ["schedule", "measured", "expected", "from", "apart", "step"]
    rows = [
        [
            r.schedule,
            f"{r.measured:.1%}",
            f"{r.expected:.1%}",
            "formula" if r.by_formula else "its order",
            f"{r.apart:+.1%}",
            f"{r.step_ms:.0f} ms",
        ]
        for r in results
    ]
    line = {"benchmark": "bubble", "torch": torch.__version__, "cores": os.cpu_count()}
    line |= {"results": [asdict(result) for result in results], "missed": list(missed(results))}
    return f"{table(head, rows)}\n{json.dumps(line)}"


def main(words: Sequence[str] | None = None) -> int:
    """Measure the schedules that are asked for; returns the exit code."""
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.bubble", description=__doc__, formatter_class=form)
    parser.add_argument("--schedule", action="append", choices=list(KINDS), help="may be given again (default: all)")
    parser.add_argument("--milliseconds", type=float, default=100, help="of each pass of a block (default: 100)")
    parser.add_argument("--steps", type=int, default=5, help="that count (default: 5)")
    options = parser.parse_args(words)
    server = WarmServer(PRELOAD)
    results = []
    for schedule in options.schedule or KINDS:
        print(f"{schedule}: {options.steps} steps", file=sys.stderr, flush=True)
        what = (schedule, options.milliseconds / 1000, options.steps)
        results.append(server.run(measure, RANKS, *what, timeout=600)[0])
    print(report(results))
    return 1 if any(missed(results)) else 0


if __name__ == "__main__":
    sys.exit(main())
