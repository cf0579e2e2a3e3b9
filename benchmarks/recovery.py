"""How long a lost rank stops a run: from the signal to the next step that is done, under ``bharat launch`` and under
``torchrun --max-restarts`` with Lightning alone.

    python -m benchmarks.recovery                              # a few restarts of each
    python -m benchmarks.recovery --kills 100 --stops 10 --peer 9

Two ranks train a small decoder and save every five steps. In each attempt rank 1 gets SIGKILL (or SIGSTOP) after seven
steps, until that has happened often enough. Rank 0 writes when its script began, when the trainer had loaded, and when
its first step was done. SIGSTOP is not measured under torchrun, which does not see it: Lightning's ranks wait for the
time-out of the process group, 30 minutes by default. A restart under torchrun that takes longer than 40 s (some hang
for minutes) is ended, and counts as one of 40 s.

Goals: the median after SIGKILL under 1.5 s and five times less than the peer's, every restart good at the first try;
after SIGSTOP under 6 s with default limits. Goodput is simulated for a failure every five minutes on average, with what
was measured here for a restart and for a save: a save that training waits for, and what was done again since the last
one that was written. What the writing takes of the processors beside training is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from benchmarks.launched import PATIENCE, end, waited
from benchmarks.moments import STRUCK_AFTER, Moments, read
from lightning_bharat import events
from lightning_bharat.checkpoints.interval import best_interval
from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTConfig, GPTModule

SAVE_EVERY = 5  # steps
LAST = 60  # steps of the last attempt, in which saves are measured
BETWEEN_FAILURES = 300.0  # seconds, for goodput
GOALS = {"kill": 1.5, "stop": 6.0, "ratio": 5.0, "goodput": 0.99}
ROOT = Path(__file__).parents[1]


def train(who: str, folder: Path, signum: int, count: int) -> None:
    """On each rank."""
    from lightning_bharat.callbacks import FaultTolerantCheckpoint

    moments = Moments(folder, signum, count, LAST if who == "ours" else STRUCK_AFTER + 1)
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    config = GPTConfig(vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    rows = torch.randint(256, (4096, 65), generator=torch.Generator().manual_seed(1))
    kind: Any = FaultTolerantCheckpoint if who == "ours" else ModelCheckpoint
    trainer = L.Trainer(
        strategy="bharat_hybrid" if who == "ours" else "ddp",
        accelerator="cpu",
        devices=2,
        max_steps=10**6,
        callbacks=[moments, kind(folder / "saved", every_n_train_steps=SAVE_EVERY, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in rows], batch_size=2)
    trainer.fit(GPTModule(config), loader, ckpt_path="last")


@dataclass(frozen=True)
class Restart:
    """Seconds after a rank was struck.

    Attributes:
        found: until the launcher knew; ``None``: it does not say.
        started: until the script ran again.
        loaded: until the trainer had read its checkpoint.
        step: until the first step was done.
        tries: attempts that it took.
    """

    found: float | None
    started: float
    loaded: float
    step: float
    tries: int


@dataclass(frozen=True)
class Saves:
    """Of ours, in the last attempt: medians of seconds.

    Attributes:
        stall: for which training stops.
        written: until it is on the disk.
    """

    stall: float
    written: float


def measure(who: str, signum: int, count: int, timeout: float) -> tuple[list[Restart | None], Saves]:
    """Restarts of one run under its launcher (``None``: none came in time), and what saves of ours take."""
    launcher = ["lightning_bharat.cli", "launch"] if who == "ours" else ["torch.distributed.run", "--standalone"]
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        words = [sys.executable, "-m", *launcher, "--nproc-per-node=2", f"--max-restarts={10 * count}"]
        words += ["--run", name] if who == "ours" else []
        words += [__file__, "--as_rank", who, name, str(int(signum)), str(count)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (Path(name) / "output").open("w") as output:
            process = subprocess.Popen(words, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = waited(process, Path(name) / "moments", who == "ours", timeout)
        finally:
            end(process)
        if code and who == "ours":
            raise RuntimeError((Path(name) / "output").read_text()[-5000:])
        happened = events.read(Path(name))
        saves = [event for event in happened if event["kind"] == "save"][2 - LAST // SAVE_EVERY :] or [
            {"stall": 0.0, "seconds": 0.0}
        ]
        found = [event["time"] - (time.time() - time.monotonic()) for event in happened if event["kind"] == "failure"]
        took = Saves(*(median(save[key] for save in saves) for key in ("stall", "seconds")))
        return restarts(read(Path(name) / "moments"), found), took


def restarts(moments: Sequence[tuple[float, int, str]], found: Sequence[float]) -> list[Restart | None]:
    """From what ranks have written."""
    every: list[tuple[float, int, str]] = sorted(moments)
    out: list[Restart | None] = []
    struck = [(at, attempt) for at, attempt, what in every if what == "struck"]
    for at, attempt in struck:
        later = [moment for moment in every if moment[0] > at and moment[1] > attempt]
        stepped = next((moment for moment in later if moment[2] == "step"), None)
        if stepped is None:
            out.append(None)
            continue
        mine = {what: when for when, number, what in later if number == stepped[1]}
        known = next((when - at for when in found if when > at), None)
        times = (mine[what] - at for what in ("script", "loaded", "step"))
        out.append(Restart(known, *times, tries=stepped[1] - attempt))
    return out


def goodput(restart: float, stall: float, written: float = 0.0, hours: float = 100.0) -> tuple[float, float]:
    """The share of time in steps that stay, by a simulated clock, and the interval between saves.

    Failures come at random, :data:`BETWEEN_FAILURES` seconds apart on average; saves as ``interval="auto"`` makes them.
    A failure before a save is on the disk, ``written`` seconds after it was begun, takes it.
    """
    draw, interval = random.Random(1), best_interval(stall, BETWEEN_FAILURES)
    clock = kept = 0.0
    while clock < hours * 3600:
        lives = draw.expovariate(1 / BETWEEN_FAILURES)
        kept += interval * max(0, (lives - max(0.0, written - stall)) // (interval + stall))
        clock += lives + restart
    return kept / clock, interval


def step(found: Sequence[Restart | None]) -> list[float]:
    """Seconds until the first step; of those that did not come to it, until they were ended."""
    return [PATIENCE if each is None else each.step for each in found]


def row(name: str, every: Sequence[Restart | None]) -> list[str]:
    """Of the table: medians."""
    found = [each for each in every if each is not None]

    def middle(values: Sequence[float]) -> str:
        return f"{median(values):.2f} s" if values else "–"

    known = [each.found for each in found if each.found is not None]
    first = sum(each.tries == 1 for each in found)
    slowest, never = max(step(every), default=0.0), len(found) < len(every)
    return [
        name,
        middle(known),
        middle([each.started - (each.found or 0.0) for each in found]),
        middle([each.loaded - each.started for each in found]),
        middle(step(every)),
        f"{'≥ ' if never else ''}{slowest:.2f} s",
        f"{first} of {len(every)}",
        str(len(every) - len(found)),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns 1 where a goal is missed."""
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.recovery", description=__doc__, formatter_class=form)
    parser.add_argument("--as_rank", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=20, help="restarts after SIGKILL, ours")
    parser.add_argument("--stops", type=int, default=5, help="restarts after SIGSTOP, ours")
    parser.add_argument("--peer", type=int, default=4, help="restarts after SIGKILL under torchrun")
    options = parser.parse_args(words)
    if options.as_rank:
        who, folder, signum, count = options.as_rank
        train(who, Path(folder), int(signum), int(count))
        return 0
    kills, saves = measure("ours", signal.SIGKILL, options.kills, 60 + 15 * options.kills)
    stops, _ = measure("ours", signal.SIGSTOP, options.stops, 60 + 20 * options.stops) if options.stops else ([], None)
    peers: list[Restart | None] = []
    for number in range(options.peer):
        print(f"torchrun, run {number + 1} of {options.peer}", file=sys.stderr, flush=True)
        peers += measure("lightning", signal.SIGKILL, 1, PATIENCE)[0]
    head = ["", "found", "then started", "then loaded", "first step", "slowest", "at the first try", "never"]
    named = {"bharat launch, SIGKILL": kills, "bharat launch, SIGSTOP": stops, "torchrun, SIGKILL": peers}
    print(table(head, [row(name, found) for name, found in named.items() if found]))
    ours, stopped, peer = (median(step(found) or [inf]) for found in (kills, stops, peers))
    share, interval = goodput(ours, saves.stall, saves.written)
    print(
        f"\ngoodput with a failure every {BETWEEN_FAILURES:.0f} s (simulated): {share:.2%}, with {ours:.2f} s for a "
        f"restart and a save every {interval:.1f} s that stops training for {saves.stall * 1e3:.1f} ms and is written "
        f"after {saves.written * 1e3:.0f} ms"
    )
    ratio = peer / ours if peers else None
    met = {
        "kill": ours < GOALS["kill"],
        "stop": not stops or stopped < GOALS["stop"],
        "ratio": ratio is None or ratio > GOALS["ratio"],
        "goodput": share > GOALS["goodput"],
        "first try": sum(each is not None and each.tries == 1 for each in kills) == options.kills,
    }
    found = {"kill": ours, "stop": stopped if stops else None, "ratio": ratio, "goodput": share}
    figures = {**found, "restarts": len(kills)}
    print(json.dumps({"benchmark": "recovery", "torch": torch.__version__, **figures, "met": met}))
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
