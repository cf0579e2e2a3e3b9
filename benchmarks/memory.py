"""How many bytes a rank holds in training steps: measured on real ranks, against one process, DDP, and the planner.

    python -m benchmarks.memory
    python -m benchmarks.memory --layout data=4,tensor=2

The same decoder is trained for a few steps by the strategy, by Lightning's DDP in the same ranks where all of them are
data ranks, and by Lightning on one process. After the last step each rank counts the bytes of the storages behind its
parameters, its gradients and its optimizer's states, each storage once; the fullest rank is shown. `gathered` are the
weights that are whole over data ranks at once, while a block runs, as modules show them: in the backward pass FSDP2
gathers one more block ahead. `activations` is what autograd keeps at the fullest moment of a step. The planner's bytes
are those by which `bharat layout` chooses. With expert ranks it is a decoder with experts, which tokens choose in turn:
the planner takes loads for even. ``--trained_routers`` leaves the choice to the routers.

There are two goals: that parameters, gradients and optimizer states on 8 data ranks are each more than 80 % below one
process; and that the planner's parameters, gradients, optimizer states and activations are within 5 % of the measured
ones, on every stage of every layout. Exit code 1: a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.contestants import Batch, ByTrainer, batches, ours
from benchmarks.held import Count, Even, Held, planned
from benchmarks.overhead import SIZES, Size
from lightning_bharat import Layout
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import size as in_words
from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTConfig, GPTModule

STEPS = 2
GOAL, RANKS = 0.8, 8
NEAR = 0.05
HELD = ("parameters", "gradients", "optimizer")
LAYOUTS = (
    "data=8",
    "tensor=4",
    "data=4,tensor=2",
    "pipeline=4",
    "data=4,pipeline=2",
    "data=2,tensor=2,pipeline=2",
    "data=4,expert=2",
    "data=2,tensor=2,expert=2",
    "context=4",
    "data=2,pipeline=2,context=2,expert=2",
)
EXPERTS = 8


@dataclass(frozen=True)
class Result:
    """Bytes on ranks.

    Attributes:
        ours: measured under the layout, of each stage the fullest rank.
        planned: of the same, by the planner.
        ddp: measured on as many ranks, if all are data ranks. Without DDP's buckets, which are as large as the
            gradients.
        one: measured on one process.
    """

    layout: str
    size: str
    ours: list[Held]
    planned: list[Held]
    ddp: Held | None
    one: Held

    @property
    def fullest(self) -> int:
        """The stage with the fullest rank."""
        return max(range(len(self.ours)), key=lambda i: self.ours[i].total + self.ours[i].activations)

    @property
    def saved(self) -> dict[str, float]:
        """Which share of one process' bytes a rank does without."""
        return {name: 1 - getattr(self.ours[self.fullest], name) / getattr(self.one, name) for name in HELD}

    @property
    def apart(self) -> dict[str, float]:
        """How far the planner is from what was measured, at most, over all stages."""
        pairs = list(zip(self.ours, self.planned, strict=True))
        return {
            name: max(abs(getattr(said, name) / getattr(held, name) - 1) for held, said in pairs)
            for name in (*HELD, "activations")
        }

    @property
    def verdict(self) -> str:
        """``"met"`` or ``"missed"``."""
        enough = self.layout != f"data={RANKS}" or min(self.saved.values()) > GOAL
        return "met" if enough and max(self.apart.values()) <= NEAR else "missed"


def config_of(size: str, experts: bool) -> GPTConfig:
    """Of the decoder; with experts of a quarter of its width, of which two are a token's."""
    dense = SIZES[size].config
    return replace(dense, num_experts=EXPERTS, moe_intermediate_size=dense.inner_size // 4) if experts else dense


def cut(
    layout: str, size: str, schedule: str = "1F1B", even: bool = True
) -> tuple[list[Held], list[Held], Held | None]:
    """Train under ``layout``, then with DDP if it is one of data ranks; every rank of ``layout`` calls it.

    Args:
        layout: with expert ranks: a decoder with experts.
        size: of the decoder.
        schedule: of a pipeline.
        even: tokens choose their experts in turn.

    Returns:
        What the fullest rank of each stage holds, what the planner says about it, and what one holds under DDP.
    """
    made, sizes = Layout.parse(layout), SIZES[size]
    rows = 2 * made.pipeline if made.pipeline > 1 else 1
    config = config_of(size, made.expert > 1)
    strategy, loop = ours(config, made, rows, schedule, kind=Even if even and made.expert > 1 else GPTModule)
    measured = _of_stages(_train(loop, sizes, rows), made)
    ddp = None
    if made.data == made.devices:
        loop = ByTrainer(config, made, DDPStrategy(process_group_backend="gloo"))
        ddp = _of_stages(_train(loop, sizes), made)[0]
    assert strategy.plan is not None
    return measured, planned(config, made, strategy.plan, rows, sizes.time, schedule), ddp


def one_process(size: str, experts: bool = False) -> Held:
    """Train without any strategy, on the one rank that calls it."""
    return _train(ByTrainer(config_of(size, experts), Layout(), "auto"), SIZES[size])


def _train(loop: ByTrainer, size: Size, rows: int = 1) -> Held:
    count = Count()
    loop.callbacks.append(count)
    loop(OneLoader(batches(size.config, rows, size.time, STEPS, 0)))
    return count.held


class OneLoader:
    """Batches; a list would be to Lightning a list of loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _of_stages(held: Held, layout: Layout) -> list[Held]:
    """The most that the ranks of each stage hold."""
    bytes = torch.zeros(layout.pipeline, len(fields(Held)), dtype=torch.long)
    bytes[layout.coordinates(dist.get_rank())["pipeline"]] = torch.tensor(list(asdict(held).values()))
    dist.all_reduce(bytes, dist.ReduceOp.MAX)
    return [Held(*row) for row in bytes.tolist()]


def main(words: Sequence[str] | None = None) -> int:
    """Measure the layouts that are asked for; returns the exit code."""
    options = _options(words)
    server = WarmServer((*PRELOAD, "benchmarks.contestants"))
    one = cache(lambda experts: server.run(one_process, 1, options.size, experts, timeout=600)[0])
    results = []
    for layout in options.layout or LAYOUTS:
        print(layout, file=sys.stderr, flush=True)
        made = Layout.parse(layout)
        ours, said, ddp = server.run(
            cut, made.devices, layout, options.size, "1F1B", not options.trained_routers, timeout=600
        )[0]
        results.append(Result(layout, options.size, ours, said, ddp, one(made.expert > 1)))
    print(report(results))
    return int(any(result.verdict == "missed" for result in results))


def report(results: Sequence[Result]) -> str:
    """A table for people, and a line of JSON."""
    head = ["layout", "", *(field.name for field in fields(Held)), "verdict"]
    rows = [row for result in results for row in _rows(result)]
    found = [
        {**asdict(result), "saved": result.saved, "apart": result.apart, "verdict": result.verdict}
        for result in results
    ]
    line = {"benchmark": "memory", "torch": torch.__version__, "cores": os.cpu_count(), "results": found}
    return f"{table(head, rows)}\n{json.dumps(line)}"


def _rows(result: Result) -> list[list[str]]:
    def row(name: str, held: Held) -> list[str]:
        return [result.layout, name, *(in_words(bytes) for bytes in asdict(held).values()), ""]

    saved = [f"{result.saved[name]:.1%}" for name in HELD]
    apart = {name: f"{share:.1%}" for name, share in result.apart.items()}
    return [
        row("one process", result.one),
        *([row("DDP", result.ddp)] if result.ddp else []),
        row("bharat", result.ours[result.fullest]),
        row("the planner", result.planned[result.fullest]),
        [result.layout, "below one process", *saved, "", "", ""],
        [result.layout, "planner apart", *(apart.get(f.name, "") for f in fields(Held)), result.verdict],
    ]


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__, formatter_class=form)
    parser.add_argument("--layout", action="append", help=f"may be given again (default: {' '.join(LAYOUTS)})")
    parser.add_argument("--size", choices=list(SIZES), default="large", help="of the decoder (default: large)")
    parser.add_argument("--trained_routers", action="store_true", help="loads of experts are those of routers")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
