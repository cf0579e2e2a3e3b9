"""Whether ``schedule="auto"`` takes the fastest pipeline schedule, on blocks that sleep:

    python -m benchmarks.schedules

Four ranks, eight blocks. Each case has other times of a block's three passes, or another number of micro-batches; in
each, all schedules are run, and "auto" predicts what they take from one block that it measures before the first step.
Sleeping blocks share no core, so the figures do not depend on the machine.

The goal is that the chosen schedule's step is within 5 % of the fastest one's. Exit code 1: it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.bubble import BLOCKS, RANKS, Sleepers, followed
from lightning_bharat import HybridStrategy
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import table

GOAL = 0.05


@dataclass(frozen=True)
class Case:
    """Milliseconds of a block's passes, and micro-batches."""

    forward: float
    inputs: float
    weights: float
    microbatches: int

    def __str__(self) -> str:
        passes = f"{self.forward:g} / {self.inputs:g} / {self.weights:g} ms"
        return f"forward / inputs / weights {passes}, {self.microbatches} micro-batches"


CASES = (Case(40, 40, 40, 8), Case(40, 40, 40, 4), Case(20, 60, 40, 8), Case(60, 80, 1, 8), Case(40, 40, 40, 3))


@dataclass(frozen=True)
class Run:
    """One fit: the schedule that was used, the median step's seconds and bubble, and what was predicted of each
    schedule."""

    schedule: str
    seconds: float
    bubble: float
    predicted: dict[str, tuple[float, float]]


def run(schedule: str, case: Case, steps: int) -> Run:
    """Train; every rank calls it."""
    strategy = HybridStrategy(pipeline_parallel_size=RANKS, schedule=schedule, num_microbatches=case.microbatches)
    blocks = Sleepers([(case.forward / 1000, case.inputs / 1000, case.weights / 1000)] * BLOCKS)
    timelines = followed(strategy, blocks, case.microbatches, steps)
    return Run(
        strategy.schedule,
        median(timeline.seconds for timeline in timelines),
        median(timeline.bubble for timeline in timelines),
        {p.name: (p.seconds, p.bubble) for p in strategy.predicted},
    )


@dataclass(frozen=True)
class Result:
    """A case: what "auto" chose, and each schedule's run."""

    case: Case
    auto: Run
    fixed: tuple[Run, ...]

    @property
    def behind(self) -> float:
        """By how much the chosen schedule's step is longer than that of the fastest one."""
        seconds = {r.schedule: r.seconds for r in self.fixed}
        return seconds[self.auto.schedule] / min(seconds.values()) - 1

    def __str__(self) -> str:
        rows = []
        for r in sorted(self.fixed, key=lambda r: r.seconds):
            seconds, bubble = self.auto.predicted[r.schedule]
            chosen = "chosen" if r.schedule == self.auto.schedule else ""
            both = [f"{1000 * seconds:.0f} ms", f"{1000 * r.seconds:.0f} ms", f"{r.seconds / seconds - 1:+.1%}"]
            rows.append([r.schedule, *both, f"{bubble:.1%}", f"{r.bubble:.1%}", chosen])
        head = ["schedule", "predicted", "measured", "apart", "bubble predicted", "measured", ""]
        return f"{self.case}\n{table(head, rows)}\nthe chosen one is {self.behind:+.1%} from the fastest"


def measure(server: WarmServer, case: Case, steps: int) -> Result:
    """All schedules that take so many micro-batches, and "auto"."""
    auto: Run = server.run(run, RANKS, "auto", case, steps, timeout=600)[0]
    fixed = []
    for name in auto.predicted:
        print(f"{case}: {name}", file=sys.stderr, flush=True)
        fixed.append(server.run(run, RANKS, name, case, steps, timeout=600)[0])
    return Result(case, auto, tuple(fixed))


def main(words: Sequence[str] | None = None) -> int:
    """Measure all cases; returns the exit code."""
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.schedules", description=__doc__, formatter_class=form)
    parser.add_argument("--steps", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--case", type=int, action="append", help=f"from 0 to {len(CASES) - 1} (default: all)")
    options = parser.parse_args(words)
    server = WarmServer(PRELOAD)
    results = []
    for number in options.case or range(len(CASES)):
        results.append(measure(server, CASES[number], options.steps))
        print(f"{results[-1]}\n", flush=True)
    line = {"benchmark": "schedules", "torch": torch.__version__, "cores": os.cpu_count()}
    line |= {"results": [asdict(result) | {"behind": result.behind} for result in results], "goal": GOAL}
    print(json.dumps(line))
    return 1 if any(result.behind > GOAL for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
