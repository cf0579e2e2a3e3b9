"""What `tune` adds to a trial, beside plain Optuna in warm processes; and the same trials under Ray Tune.

    python -m benchmarks.tuning [--parts latency workers ray] [--ray-python /path/to/python]

latency: seconds from a trial's ``study.tell`` to the next trial's first step of training, less the same in one process
that has built its module and Trainer before, with a study in memory. Goal: a median of 0.2 s at most. The cold start,
from the first call to the first step, stands apart.

workers: the throughput of two workers, a core each, to that of two processes of plain Optuna, pinned to the same cores;
from the first ask to the last tell. Goal: 95 %. The null are the two processes against themselves.

ray: seconds to the same trials, two at a time, each side in a process of its own; Ray's Python is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import torch

from benchmarks.paired import Interval, is_void, median_interval, orders, paired_ratio
from benchmarks.tuned_peer import watch
from benchmarks.tuned_sides import ROOT, Ours, Peers
from benchmarks.tuned_task import MOMENTS, moments, quiet
from lightning_bharat.commands.table import table
from lightning_bharat.tuning.slots import usable_cores

PARTS = ("latency", "workers", "ray")
MOST_SECONDS, LEAST_SHARE = 0.2, 0.95
NULL_SECONDS = 0.02  # from which on plain Optuna differs from itself
BLOCK = 10  # pairs of latencies before the other side has its turn
RAY_TRIALS, RAY_MODULE = 12, "benchmarks.ray_tune"


@dataclass(frozen=True)
class Latency:
    """Seconds from tell to the next first step.

    Attributes:
        ours, plain: medians.
        difference, null: ours less plain, and plain less plain, pair by pair.
        cold_ours, cold_plain: from the first call of a process that has Optuna imported, and from the start of one,
            to its first step.
    """

    pairs: int
    ours: float
    plain: float
    difference: Interval
    null: Interval
    cold_ours: float
    cold_plain: float

    @property
    def verdict(self) -> str:
        """By the median; nothing on a busy machine."""
        if abs(self.null.median) > NULL_SECONDS:
            return "void"
        return "met" if self.difference.median <= MOST_SECONDS else "missed"


@dataclass(frozen=True)
class Workers:
    """Throughput of two at a time.

    Attributes:
        seconds: of a block of plain Optuna, the median.
        ratio, null: of ours to plain Optuna's, and of that to itself.
    """

    blocks: int
    trials: int
    seconds: float
    ratio: Interval
    null: Interval

    @property
    def verdict(self) -> str:
        """By the median; nothing on a busy machine."""
        return "void" if is_void(self.null) else "met" if self.ratio.median >= LEAST_SHARE else "missed"


def latency(ours: Ours, pairs: int, folder: Path) -> Latency:
    """Blocks of short trials in turns."""
    began = time.monotonic()
    cold_ours = moments(ours.run(1, 0, 1), "step")[0] - began
    began, peers = time.monotonic(), Peers([None], folder)
    cold_plain = moments(peers.run(2, 0), "step")[0] - began
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "null": []}
    for order in orders(tuple(seconds), max(1, pairs // BLOCK)):
        for name in order:
            trials = 1 + min(BLOCK, pairs)
            seconds[name] += _gaps(ours.run(trials, 0, 1) if name == "ours" else peers.run(trials, 0))
    peers.close()
    a, b, c = (seconds[name] for name in ("ours", "plain", "null"))
    return Latency(len(a), median(a), median(b), _less(a, b), _less(c, b), cold_ours, cold_plain)


def _less(one: Sequence[float], other: Sequence[float]) -> Interval:
    return median_interval([a - b for a, b in zip(one, other, strict=True)])


def _gaps(path: Path) -> list[float]:
    """From each tell to the step after it; a tell of a point that never ran has none of its own."""
    tells, steps = moments(path, "tell"), moments(path, "step")
    return [step - tell for tell, step in zip(tells, steps[1:], strict=False)]


def workers(ours: Ours, blocks: int, trials: int, epochs: int, folder: Path) -> Workers:
    """Blocks of trials in turns, two at a time."""
    cores = sorted(usable_cores())[:2]
    if len(cores) < 2:
        raise SystemExit("workers: two cores are needed; write --parts latency")
    os.sched_setaffinity(0, cores)  # two workers share all that there are
    peers = Peers(cores, folder)
    ours.run(2, 0, 2), peers.run(2, 0)
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "null": []}
    for order in orders(tuple(seconds), blocks):
        for name in order:
            path = ours.run(trials, epochs, 2) if name == "ours" else peers.run(trials, epochs)
            seconds[name].append(moments(path, "told")[-1] - moments(path, "ask")[0])
    peers.close()
    a, b, c = (seconds[name] for name in ("ours", "plain", "null"))
    return Workers(blocks, trials, median(b), paired_ratio(b, a), paired_ratio(b, c))


def ray(python: Path, epochs: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds to the same trials from the start of a process that has imported nothing, and from their first step."""
    sides = {"ours": (sys.executable, "benchmarks.tuned_sides"), "ray": (str(python), RAY_MODULE)}
    seconds = {}
    for name, (interpreter, module) in sides.items():
        command = [interpreter, "-m", module, "--trials", str(RAY_TRIALS), "--epochs", str(epochs)]
        began, path = time.monotonic(), folder / name
        environment = {**os.environ, MOMENTS: str(path), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        ended, steps = time.monotonic(), moments(path, "step")
        if len(steps) != RAY_TRIALS:
            raise RuntimeError(f"{name}: {len(steps)} trials began, not {RAY_TRIALS}")
        seconds[name] = ended - began, ended - steps[0]
    return seconds


def _no_ray(python: Path | None) -> str:
    """Why Ray can't be run."""
    if python is None:
        return "ray: not run; name the Python of an environment that has Ray Tune: --ray-python PATH"
    if not (ROOT / f"{RAY_MODULE.replace('.', '/')}.py").is_file():
        return f"ray: not run; there is no {RAY_MODULE} here"
    return "" if python.is_file() else f"ray: not run; --ray-python={python} is no file"


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns 1 where a goal is missed."""
    given = _options(words)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet()
    watch()
    found: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        ours = Ours(folder)
        if "latency" in given.parts:
            found["latency"] = latency(ours, given.pairs, folder)
        if "workers" in given.parts:
            found["workers"] = workers(ours, given.blocks, given.trials, given.epochs, folder)
        if no_ray := _no_ray(given.ray_python) if "ray" in given.parts else "":
            print(no_ray)
        elif "ray" in given.parts:
            found["ray"] = ray(given.ray_python, given.epochs, folder)
    print(report(found))
    plain = {part: value if part == "ray" else asdict(value) for part, value in found.items()}
    print(json.dumps({"benchmark": "tuning", "torch": torch.__version__, "cores": os.cpu_count(), **plain}))
    return int(any(getattr(value, "verdict", "met") == "missed" for value in found.values()))


def report(found: dict[str, Any]) -> str:
    """Tables for people."""
    parts = []
    if latency := found.get("latency"):
        head = ["from tell to the next step", "ours", "plain", "ours - plain [95 %]", "null [95 %]", "pairs", ""]
        row = ["", f"{latency.ours:.3f} s", f"{latency.plain:.3f} s", f"{latency.difference}", f"{latency.null}"]
        cold = (
            f"cold: {latency.cold_ours:.1f} s with the server's imports; plain {latency.cold_plain:.1f} s with its own"
        )
        parts += [table(head, [[*row, str(latency.pairs), latency.verdict]]), cold]
    if workers := found.get("workers"):
        head = ["two workers", "ours/plain [95 %]", "null [95 %]", "blocks", "trials of each", "seconds of each", ""]
        row = ["throughput", f"{workers.ratio}", f"{workers.null}", str(workers.blocks), str(workers.trials)]
        parts += [table(head, [[*row, f"{workers.seconds:.1f}", workers.verdict]])]
    if ray := found.get("ray"):
        rows = [[name, *(f"{each:.1f} s" for each in seconds)] for name, seconds in ray.items()]
        parts += [table([f"{RAY_TRIALS} trials, two at a time", "from nothing", "from the first step"], rows)]
    return "\n\n".join(parts)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.tuning", description=__doc__, formatter_class=form)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--pairs", type=int, default=30, help="of latencies, 6 at least (default: 30)")
    parser.add_argument("--blocks", type=int, default=6, help="of two workers, 6 at least (default: 6)")
    parser.add_argument("--trials", type=int, default=2, help="in each block (default: 2)")
    parser.add_argument(
        "--epochs", type=int, default=16, help="of 250 steps, in trials of blocks and under Ray (default: 16)"
    )
    parser.add_argument("--ray-python", type=Path, help="the Python of an environment with Ray Tune")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
