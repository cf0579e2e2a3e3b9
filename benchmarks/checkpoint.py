"""What a checkpoint costs: how long a save beside training stops it, and how long saves and loads take against plain
DCP and Lightning's ModelParallelStrategy.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --size small --rounds 8

A decoder is trained for a step by `bharat_hybrid` and by ModelParallelStrategy in the same ranks, each with AdamW's
states; then both, and torch.distributed.checkpoint on the peer's own state, save and load in turns, in changing order.
All bring their files to disk. A time is that of the slowest rank. A save beside training stops it until what may change
has been copied, and in the next step from its backward pass until the weights have been; the rest of what it costs is
in the ratio of that step to another. A round gives ratios of ours to each peer, and the
null: Lightning's save, and load, to a second one of its own.

The goals: a save beside training stops it for at most 5 % of the time of a save that it waits for (upper 95 % bound);
saves and loads take at most what the peers' take (lower bound). Ours also computes a digest of each file when it
writes, and compares it when it reads. Exit code 1: a goal missed. Disks are noisy: look at the null.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.contestants import ByTrainer, batches, lightnings, ours
from benchmarks.paired import Interval, Turns, orders, paired_ratio
from lightning_bharat import Layout
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTConfig
from lightning_bharat.strategies.checkpoint import ShardedCheckpoints

LAYOUT = Layout(data=2)
SIZES = {  # bytes of weights and AdamW's two states, in float32
    "tiny": GPTConfig(64, 32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "small": GPTConfig(4096, 512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8),  # 0.14 GB
    "large": GPTConfig(8192, 1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8),  # 1.0 GB
}
TIME = 64  # tokens of a step
LEAST_ROUNDS = 6
GOALS = {"stall": 0.05, "save against DCP": 1.0, "save against Lightning": 1.0}
GOALS |= {"load against DCP": 1.0, "load against Lightning": 1.0}


@dataclass(frozen=True)
class Result:
    """One size.

    Attributes:
        bytes: of the weights and the optimizer's states.
        ratios: by row.
        seconds: medians, by what was timed.
    """

    size: str
    rounds: int
    bytes: int
    ratios: dict[str, Interval]
    seconds: dict[str, float]

    def verdict(self, row: str) -> str:
        """``"met"``, ``"missed"``, or nothing for a null."""
        if row not in GOALS:
            return ""
        ratio = self.ratios[row]
        return "met" if (ratio.high if row == "stall" else ratio.low) <= GOALS[row] else "missed"


class _Held(L.Callback):
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer, self.module = trainer, module


def measure(size: str, rounds: int, folder: str, seed: int = 0) -> Result:
    """Save and load in turns; every rank calls it."""
    config = SIZES[size]
    strategy, own = ours(config, LAYOUT, 1)
    (first, turns), (second, others) = (_hold(loop, config, rounds) for loop in (own, lightnings(config, LAYOUT)))
    place = Path(folder)
    doings = _ours(first.trainer, strategy, turns, place) | _lightnings(second, place) | _plain(second, place)
    found: dict[str, list[float]] = {name: [] for name in doings if not name.startswith("after")}
    for number, order in enumerate(orders(["ours", "beside", "lightning", "again", "plain"], rounds + 1, seed)):
        for name in order:
            for doing in [doing for doing in found if doing.startswith(f"{name} ")]:
                seconds = _timed(doings[doing])
                if number:  # the first round warms up
                    found[doing].append(seconds)
            _clean(place, name, doings)
    turns.end()
    others.end()
    weights = sum(p.numel() for p in first.module.parameters()) * 4 * 3
    found["beside save"] = [save + wait for save, wait in zip(found["beside save"], found["beside wait"], strict=True)]
    ratio = lambda one, other: paired_ratio(found[one], found[other])  # noqa: E731
    ratios = {"stall": ratio("beside save", "ours save"), "step beside a save": ratio("beside step", "ours step")}
    for what in ("save", "load"):
        ratios |= {
            f"{what} against DCP": ratio(f"ours {what}", f"plain {what}"),
            f"{what} against Lightning": ratio(f"ours {what}", f"lightning {what}"),
            f"null of {what}s": ratio(f"again {what}", f"lightning {what}"),
        }
    return Result(size, rounds, weights, ratios, {name: median(every) for name, every in found.items()})


def _hold(loop: ByTrainer, config: GPTConfig, rounds: int) -> tuple[_Held, Turns]:
    """Let ``loop`` train for a step, and wait in the middle of its run."""
    held = _Held()
    loop.callbacks.append(held)
    turns: Turns = Turns(loop, batches(config, 1, TIME, 2 * rounds + 6, int(os.environ["RANK"])))
    turns.begin()
    turns.step()
    return held, turns


Doings = dict[str, Callable[[], Any]]


def _ours(trainer: L.Trainer, strategy: Any, turns: Turns, place: Path) -> Doings:
    def beside() -> None:
        with strategy.saves.put_off():
            trainer.save_checkpoint(place / "beside")

    def waited() -> float:
        return strategy.saves.waited

    def load() -> None:
        checkpoint = strategy.load_checkpoint(place / "ours")
        strategy.load_model_state_dict(checkpoint)
        ShardedCheckpoints.load_optimizer_state_dict(strategy, checkpoint)

    def settled() -> None:
        strategy.saves.writer.wait()
        if error := strategy.saves.writer.take_error():
            raise error

    save = lambda: trainer.save_checkpoint(place / "ours")  # noqa: E731
    return {
        **{"ours save": save, "ours load": load, "ours step": turns.step, "after beside": settled},
        **{"beside save": beside, "beside step": turns.step, "beside wait": waited},
    }


def _lightnings(held: _Held, place: Path) -> Doings:
    found: Doings = {}
    for name in ("lightning", "again"):
        found[f"{name} save"] = lambda name=name: held.trainer.save_checkpoint(place / name)
        found[f"{name} load"] = lambda name=name: held.trainer.strategy.load_checkpoint(place / name, False)
    return found


def _plain(held: _Held, place: Path) -> Doings:
    module, optimizers = held.module, held.trainer.optimizers

    def save() -> None:
        model, states = get_state_dict(module, optimizers)
        dcp.save({"model": model, "optimizers": states}, checkpoint_id=place / "plain")

    def load() -> None:
        model, states = get_state_dict(module, optimizers)
        both = {"model": model, "optimizers": states}
        dcp.load(both, checkpoint_id=place / "plain")
        set_state_dict(module, optimizers, model_state_dict=both["model"], optim_state_dict=both["optimizers"])

    return {"plain save": save, "plain load": load}


def _timed(function: Callable[[], Any]) -> float:
    dist.barrier()
    began = time.perf_counter()
    said = function()
    seconds = torch.tensor(said if isinstance(said, float) else time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _clean(place: Path, name: str, doings: Doings) -> None:
    doings.get(f"after {name}", dist.barrier)()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place / name)
    dist.barrier()


def main(words: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    options = _options(words)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        what = (options.size, options.rounds, folder, options.seed)
        result = WarmServer(PRELOAD).run(measure, LAYOUT.devices, *what, timeout=3600)[0]
    print(report(result))
    return 0 if all(result.verdict(row) != "missed" for row in result.ratios) else 1


def report(result: Result) -> str:
    """A table for people, and a line of JSON."""
    head = ["row", "ratio [95 %]", "goal", "verdict"]
    rows = [[row, f"{ratio}", f"{GOALS.get(row, '')}", result.verdict(row)] for row, ratio in result.ratios.items()]
    times = [[name, f"{1000 * seconds:.1f} ms"] for name, seconds in result.seconds.items()]
    line = {"benchmark": "checkpoint", "torch": torch.__version__, "cores": os.cpu_count(), "result": asdict(result)}
    sizes = f"{result.bytes / 1e9:.3f} GB on {LAYOUT.devices} ranks, {result.rounds} rounds"
    return f"{sizes}\n{table(head, rows)}\n\n{table(['', 'median'], times)}\n{json.dumps(line)}"


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.checkpoint", description=__doc__, formatter_class=form)
    parser.add_argument("--size", choices=list(SIZES), default="large", help="of the decoder (default: large, 1 GB)")
    parser.add_argument("--rounds", type=int, default=12, help="rounds that count (default: 12)")
    parser.add_argument("--folder", help="where checkpoints are written (default: the system's for temporary files)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    options = parser.parse_args(words)
    if options.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds {options.rounds}: an interval takes {LEAST_ROUNDS} at least")
    return options


if __name__ == "__main__":
    sys.exit(main())
