"""The longest sequence that fits a fixed memory, on one rank and on context ranks.

    python -m benchmarks.context
    python -m benchmarks.context --ranks 2 --time 256

The memory is what autograd keeps in one training step of a deep decoder on one process with a sequence of ``--time``.
For each number of context ranks, real steps of growing length are taken until the next one would keep more on a rank.
All bytes are counted from storages. The goal is that the longest sequence grows in proportion to the ranks, but for
what is whole on each of them (embedding, head and loss): at least 85 % of it. Exit code 1: it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.contestants import ByTrainer, batches
from benchmarks.held import Count
from benchmarks.memory import OneLoader
from lightning_bharat import HybridStrategy, Layout
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import size as in_words
from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTConfig

CONFIG = GPTConfig(64, 64, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4)
RANKS = (2, 4)
GOAL = 0.85
Kept = Callable[[int, int], int]


@dataclass(frozen=True)
class Result:
    """On ``ranks`` context ranks, ``longest`` is the longest sequence, of which a rank keeps ``kept`` bytes; of
    ``next``, the shortest that was too long, it would keep ``over``."""

    ranks: int
    longest: int
    kept: int
    next: int
    over: int

    def share(self, time: int) -> float:
        """Which part of growth in proportion it is, from ``time`` on one rank."""
        return self.longest / (time * self.ranks)


def kept(ranks: int, time: int) -> int:
    """Bytes that autograd keeps on this rank in a step with a sequence of ``time``; all ``ranks`` call it."""
    layout = Layout(context=ranks)
    strategy: Any = HybridStrategy(context_parallel_size=ranks) if ranks > 1 else "auto"
    count, loop = Count(), ByTrainer(CONFIG, layout, strategy)
    loop.callbacks.append(count)
    loop(OneLoader(batches(CONFIG, 1, time, 1, 0)))
    return count.held.activations


def longest(ranks: int, time: int, memory: int, kept: Kept) -> Result:
    """By steps of a sixteenth of ``time``, from growth in proportion up or down.

    Args:
        ranks: context ranks.
        time: what fits ``memory`` on one rank.
        memory: bytes.
        kept: bytes that so many ranks keep each of a sequence of some length.
    """
    step, here = max(time // 16 // ranks, 1) * ranks, time * ranks
    seen = {here: kept(ranks, here)}
    while seen[here] > memory:
        here -= step
        seen[here] = kept(ranks, here)
    while here + step not in seen:
        above = kept(ranks, here + step)
        seen[here + step] = above
        here += step * (above <= memory)
    return Result(ranks, here, seen[here], here + step, seen[here + step])


def main(words: Sequence[str] | None = None) -> int:
    """Measure the ranks that are asked for; returns the exit code."""
    options = _options(words)
    server = WarmServer((*PRELOAD, "benchmarks.contestants"))

    def on_ranks(ranks: int, time: int) -> int:
        return max(server.run(kept, ranks, ranks, time, timeout=600))

    memory = on_ranks(1, options.time)
    results = []
    for ranks in options.ranks or RANKS:
        print(f"{ranks} context ranks", file=sys.stderr, flush=True)
        results.append(longest(ranks, options.time, memory, on_ranks))
    print(report(options.time, memory, results))
    return int(any(result.share(options.time) < GOAL for result in results))


def report(time: int, memory: int, results: Sequence[Result]) -> str:
    """A table for people, and a line of JSON."""
    rows = [["1", str(time), in_words(memory), "", ""]]
    for result in results:
        share = result.share(time)
        verdict = "met" if share >= GOAL else "missed"
        rows.append([str(result.ranks), str(result.longest), in_words(result.kept), f"{share:.0%}", verdict])
    found = [{**asdict(result), "share": result.share(time)} for result in results]
    line = {"benchmark": "context", "torch": torch.__version__, "cores": os.cpu_count(), "time": time, "memory": memory}
    head = ["context ranks", "longest sequence", "kept by a rank", "of growth in proportion", "verdict"]
    return f"{table(head, rows)}\n{json.dumps({**line, 'results': found})}"


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.context", description=__doc__, formatter_class=form)
    parser.add_argument("--ranks", action="append", type=int, help=f"may be given again (default: {RANKS})")
    parser.add_argument("--time", type=int, default=512, help="length on one rank (default: 512)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
