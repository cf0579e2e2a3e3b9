"""How long training waits for its input.

    python -m benchmarks.input
    python -m benchmarks.input --part workers --rounds 8

*workers*: samples are files, read, unpacked and cropped; a training step sleeps, as a host does while its device
computes. The peer is Lightning's Trainer with the DataLoader as it is, without workers; ours is the same with
``DataLoaderTuner``, from no workers on. Whole runs take turns in changing order, since workers read ahead while others
would be measured; of each run the last epoch counts, with the start of its workers. The null is the peer to itself.

*stages*: text files straight to training with ``TextDataModule``: read, tokenize, pack, augment (a tenth of the tokens
is replaced) and batch in a process beside training; the peer is the same with these stages one after another between
the steps (``num_workers=0``). The device's step is the same sleep. Of each stage its share of the time of a run is
told.

The goal is less time, for certain (the interval's upper end is below 1). Exit code 1: it is missed, or the null is off
by more than 3 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.input_stages import read, write_texts
from benchmarks.input_workers import workers
from benchmarks.paired import is_void, orders, paired_ratio
from lightning_bharat.commands.table import table


def _workers(options: argparse.Namespace) -> tuple[str, Any, bool]:
    result, tuned = workers(options.rounds)
    settings = sorted({(run.workers, run.prefetch_factor or 0) for run in tuned})
    head = [
        "cores",
        "step, default",
        "tuned",
        "waits for input",
        "tuned",
        "tuned/default [95 %]",
        "null [95 %]",
        "goal",
    ]
    row = [f"{result.cores}", f"{result.default_ms:.1f} ms", f"{result.tuned_ms:.1f} ms", f"{result.wait_before:.0%}"]
    row += [f"{result.wait_after:.0%}", f"{result.ratio}", f"{result.null}", result.verdict]
    words = ", ".join(f"num_workers={n}, prefetch_factor={ahead}" for n, ahead in settings)
    found = {**asdict(result), "settings": settings, "verdict": result.verdict}
    return f"{table(head, [row])}\nended with {words}", found, result.verdict == "met"


def _stages(options: argparse.Namespace) -> tuple[str, Any, bool]:
    seconds: dict[str, list[float]] = {"one after another": [], "beside": [], "null": []}
    shares: dict[str, list[dict[str, float]]] = {name: [] for name in seconds}
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder))
        for order in orders(list(seconds), options.rounds):
            for name in order:
                step, busy = read(Path(folder), name == "beside")
                seconds[name].append(step)
                shares[name].append(busy)
    ratio = paired_ratio(seconds["beside"], seconds["one after another"])
    null = paired_ratio(seconds["null"], seconds["one after another"])
    verdict = "void" if is_void(null) else "met" if ratio.high < 1 else "missed"
    names = [*shares["beside"][0]]
    each = {name: [median(run[stage] for run in shares[name]) for stage in names] for name in seconds}
    rows = [
        [name, f"{1e3 * median(seconds[name]):.1f} ms", *(f"{share:.0%}" for share in each[name])]
        for name in ("one after another", "beside")
    ]
    words = f"beside/one after another {ratio}, null {null}: {verdict}"
    found = {"ratio": asdict(ratio), "null": asdict(null), "verdict": verdict, "rounds": options.rounds}
    found["shares"] = {name: dict(zip(names, each[name], strict=True)) for name in each}
    found["step_ms"] = {name: 1e3 * median(times) for name, times in seconds.items()}
    return f"{table(['stages', 'step', *names], rows)}\n{words}", found, verdict == "met"


_PARTS = {"workers": _workers, "stages": _stages}


def main(words: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit code."""
    options = _options(words)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found, met = {}, True
    for part in options.part or _PARTS:
        text, found[part], is_met = _PARTS[part](options)
        print(f"{text}\n")
        met = met and is_met
    print(json.dumps(found))
    return 0 if met else 1


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.input", description=__doc__, formatter_class=form)
    parser.add_argument("--part", action="append", choices=list(_PARTS), help="may be given again (default: all)")
    parser.add_argument("--rounds", type=int, default=8, help="runs of each (default: 8)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
