"""What the strategy costs a training step: against the same cuts in a hand-written loop, against Lightning's
ModelParallelStrategy, and against DeepSpeed's ZeRO in stages 2 and 3.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --layout data=2 --peer hand-written --size small

Three loops live in the same ranks and advance by one step in turns, in changing order: ours, the peer's, and the peer's
once more in a second instance. A round gives a ratio of ours to the peer, and the null: the peer's to itself. A step is
all that a loop does from one batch to the next, so a Trainer's holds everything that Lightning does around it; its time
is that of the slowest rank. Losses of the loops are compared: they must do the same work.

The goal is that the upper 95 % bound of the ratio is at most 1.05 for the hand-written loop, and the lower at most 1.00
for the others. Against stage 2, in which weights are whole, ours keeps gathered weights until the backward pass. A run
whose null leaves 0.97 to 1.03 is void. Exit code 1: a void run, or a goal missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.by_experts import ByExperts
from benchmarks.by_stages import ByStages
from benchmarks.contestants import ByTrainer, HandWritten, batches, deepspeeds, lightnings, ours
from benchmarks.paired import Interval, Turns, alternate, is_void, paired_ratio
from lightning_bharat import Layout
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTConfig

LAYOUTS = ("data=2", "tensor=2", "data=2,tensor=2", "pipeline=2", "data=2,expert=2")
PEERS = ("hand-written", "model-parallel", "deepspeed-2", "deepspeed-3")
Loop = ByTrainer | HandWritten | ByStages
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 5  # steps of each loop before the first that counts
COMPARED = 3  # losses; those of later steps part by rounding


@dataclass(frozen=True)
class Size:
    """A decoder, and its batches: (rows, time) for each data rank."""

    config: GPTConfig
    rows: int
    time: int


# A step of the large one is 120 to 210 ms of one core's work for a rank.
SIZES = {
    "tiny": Size(GPTConfig(64, 32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2), 2, 16),
    "small": Size(GPTConfig(512, 128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2), 2, 64),
    "large": Size(GPTConfig(2048, 256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4), 4, 128),
}


# With expert ranks blocks have these in the place of a feed-forward.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}


def runs(layout: Layout, peer: str) -> bool:
    """Whether ``peer`` has the cuts of ``layout``."""
    if peer == "hand-written":
        return True
    return layout.pipeline == layout.expert == 1 and (peer == "model-parallel" or layout.tensor == 1)


@dataclass(frozen=True)
class Result:
    """One layout against one peer.

    Attributes:
        pairs: rounds that counted.
        clock: ``"wall"``, or ``"cpu"`` for a rank's own work.
        ratio: our step to the peer's.
        null: the peer's step to its own.
        step_ms: median milliseconds of a step, by loop.
        loss_difference: between ours and the peer's first losses, relative.
    """

    layout: str
    peer: str
    size: str
    pairs: int
    clock: str
    ratio: Interval
    null: Interval
    step_ms: dict[str, float]
    loss_difference: float

    @property
    def verdict(self) -> str:
        """``"void"``, ``"met"`` or ``"missed"``."""
        if is_void(self.null) or not self.loss_difference < 1e-3:
            return "void"
        met = self.ratio.high <= 1.05 if self.peer == "hand-written" else self.ratio.low <= 1.0
        return "met" if met else "missed"


def measure(layout: str, peer: str, size: str, pairs: int, clock: str = "wall", seed: int = 0) -> Result:
    """Run the loops in turns; every rank of ``layout`` calls it."""
    loops, turns = _set_up(Layout.parse(layout), peer, SIZES[size], WARM_UP + pairs, clock)
    alternate(turns, WARM_UP, dist.barrier, seed)
    seconds = {name: _of_slowest_rank(own) for name, own in alternate(turns, pairs, dist.barrier, seed).items()}
    for loop in turns.values():
        loop.end()
    first = {name: torch.stack(loop.losses[:COMPARED]) for name, loop in loops.items()}
    return Result(
        layout=layout,
        peer=peer,
        size=size,
        pairs=pairs,
        clock=clock,
        ratio=paired_ratio(seconds["ours"], seconds["peer"]),
        null=paired_ratio(seconds["null"], seconds["peer"]),
        step_ms={name: 1000 * median(every) for name, every in seconds.items()},
        loss_difference=float((first["ours"] / first["peer"] - 1).abs().max()),
    )


def _set_up(layout: Layout, peer: str, size: Size, steps: int, clock: str) -> tuple[dict[str, Loop], dict[str, Turns]]:
    data_rank = layout.coordinates(int(os.environ["RANK"]))["data"]
    config = size.config if layout.expert == 1 else replace(size.config, **EXPERTS)
    # A pipeline's ranks share a batch: as many rows for each of them as for a data rank.
    given = batches(config, size.rows * layout.pipeline, size.time, steps + 2, data_rank)
    loops: dict[str, Loop] = {}
    turns: dict[str, Turns] = {}
    for name in ("ours", "peer", "null"):
        if name == "ours":
            strategy, loops[name] = ours(config, layout, size.rows, keeps_weights=peer == "deepspeed-2")
        elif peer == "model-parallel":
            loops[name] = lightnings(config, layout)
        elif peer.startswith("deepspeed"):
            loops[name] = deepspeeds(config, layout, int(peer[-1]))
        else:  # after ours, whose cuts the hand-written ones take
            kind = ByStages if layout.pipeline > 1 else ByExperts if layout.expert > 1 else HandWritten
            loops[name] = kind(config, strategy)
        turns[name] = Turns(loops[name], given, CLOCKS[clock])
        turns[name].begin()
    return loops, turns


def _of_slowest_rank(seconds: Sequence[float]) -> list[float]:
    every = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(every, dist.ReduceOp.MAX)
    return every.tolist()


def main(words: Sequence[str] | None = None) -> int:
    """Run the comparisons that are asked for; returns the exit code."""
    options = _options(words)
    server = WarmServer((*PRELOAD, "benchmarks.by_stages"))
    results = []
    for layout in options.layout or LAYOUTS:
        for peer in options.peer or PEERS:
            if not runs(Layout.parse(layout), peer):
                continue
            print(f"{layout} against {peer}: {options.pairs} pairs", file=sys.stderr, flush=True)
            what = (layout, peer, options.size, options.pairs, options.clock, options.seed)
            results.append(server.run(measure, Layout.parse(layout).devices, *what, timeout=3600)[0])
    print(report(results))
    return 0 if all(result.verdict == "met" for result in results) else 1


def report(results: Sequence[Result]) -> str:
    """A table for people, and a line of JSON."""
    head = ["layout", "peer", "ours/peer [95 %]", "null [95 %]", "our step", "peer's", "verdict"]
    rows = [[r.layout, r.peer, f"{r.ratio}", f"{r.null}", _ms(r, "ours"), _ms(r, "peer"), r.verdict] for r in results]
    found = [{**asdict(result), "verdict": result.verdict} for result in results]
    line = {"benchmark": "overhead", "torch": torch.__version__, "cores": os.cpu_count(), "results": found}
    return f"{table(head, rows)}\n{json.dumps(line)}"


def _ms(result: Result, name: str) -> str:
    return f"{result.step_ms[name]:.1f} ms"


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__, formatter_class=form)
    layouts = f"may be given again (default: {' '.join(LAYOUTS)})"
    parser.add_argument("--pairs", type=int, default=200, help="rounds that count (default: 200)")
    parser.add_argument("--layout", action="append", help=layouts)
    parser.add_argument("--peer", action="append", choices=PEERS, help="may be given again (default: all)")
    parser.add_argument("--size", choices=list(SIZES), default="large", help="of the decoder (default: large)")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: a rank's own work, for a look on a busy machine"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order in which loops advance")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
