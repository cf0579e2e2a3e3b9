"""Runs that lose a rank at a random moment, under ``bharat launch``, and what must hold for each of them.

    python -m tests.faults.chaos --runs 100 --seed 1        # as `make chaos`

Each run ends with the losses of an undisturbed one, bit by bit, in every step of every attempt; no checkpoint that is
listed is bad; each attempt goes on from the newest one that was there; and there are as many restarts as faults.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_bharat import events
from lightning_bharat.checkpoints.whole import checkpoints_in, problems
from tests.cluster.launching import launched_words
from tests.faults import script
from tests.faults.script import SAVE_EVERY, Fault

STEPS = 9
# Data, tensor and pipeline sizes.
LAYOUTS = {"data": [2, 1, 1], "tensor": [1, 2, 1], "pipeline": [1, 1, 2], "data × tensor": [2, 2, 1]}
LAYOUTS |= {"tensor × pipeline": [1, 2, 2]}
PHASES = ("compute", "save", "load", "start-up")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


@dataclass(frozen=True)
class Run:
    """A layout, and what happens to its ranks."""

    layout: str
    faults: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        what = [
            f"{signal.Signals(f.signum).name} of rank {f.rank} in {f.phase}"
            + (f" at step {f.step}" if f.phase in ("compute", "save") else "")
            + f" + {f.delay * 1e3:.0f} ms"
            for f in self.faults
        ]
        return f"{self.layout}: {', then '.join(what) or 'undisturbed'}"


def plan(count: int, seed: int) -> list[Run]:
    """Runs in which each layout, phase and signal has its turn, at moments that depend on the seed alone."""
    draw, runs = random.Random(seed), []
    kinds = [(layout, phase, signum) for phase in PHASES for signum in SIGNALS for layout in LAYOUTS]
    draw.shuffle(kinds)
    for number in range(count):
        layout, phase, signum = kinds[number % len(kinds)]
        ranks = LAYOUTS[layout][0] * LAYOUTS[layout][1] * LAYOUTS[layout][2]
        step = (
            draw.randrange(1, STEPS - 1) if phase == "compute" else SAVE_EVERY * draw.randrange(1, STEPS // SAVE_EVERY)
        )
        fault = Fault(0, draw.randrange(ranks), phase, step, draw.uniform(0, 0.03), signum)
        if phase == "load":  # for which there must be a restart
            first = Fault(0, draw.randrange(ranks), "compute", 5, draw.uniform(0, 0.03), signal.SIGKILL)
            runs.append(Run(layout, (first, Fault(1, fault.rank, phase, 0, fault.delay, signum))))
        else:
            here = step if phase != "start-up" else 0
            runs.append(Run(layout, (Fault(0, fault.rank, phase, here, fault.delay, signum),)))
    return runs


def carry_out(run: Run, folder: Path) -> int:
    """Launch it, with its output in ``folder``; returns the launcher's exit code."""
    sizes = LAYOUTS[run.layout]
    words = ["--nproc-per-node", str(prod(sizes)), "--limits", "stopped=1", script.__file__, str(folder)]
    faults = json.dumps([{**asdict(fault), "signum": int(fault.signum)} for fault in run.faults])
    return launched_words(folder, *words, json.dumps(sizes), str(STEPS), faults).code


@cache
def undisturbed(layout: str) -> tuple[str, ...]:
    """The losses of all steps."""
    with TemporaryDirectory() as name:
        code = carry_out(Run(layout), Path(name))
        assert code == 0, output(Path(name))
        return tuple(loss for _, loss in _lines(Path(name), "losses"))


def check(run: Run, folder: Path) -> None:
    """What must hold after it has been carried out in ``folder``.

    Raises:
        AssertionError: what does not, with the output of all ranks.
    """
    expected = undisturbed(run.layout)
    assert len(expected) == STEPS
    wrong = [
        f"step {step}: {loss}, not {expected[step - 1]}"
        for step, loss in _lines(folder, "losses")
        if loss != expected[step - 1]
    ]
    assert not wrong, f"{run}\n" + "\n".join(wrong)
    assert _lines(folder, "ended") == [STEPS], f"{run}\n{output(folder)}"
    assert {step for step, _ in _lines(folder, "losses")} == set(range(1, STEPS + 1)), str(run)
    saved = checkpoints_in(folder / "saved")
    bad = [problem for path in saved for problem in problems(path)]
    assert not bad, f"{run}\n{bad}"
    assert len(saved) == STEPS // SAVE_EVERY, f"{run}: {saved}"
    found = dict(_lines(folder, "found"))
    for attempt, step in _lines(folder, "begun"):
        assert step == found[attempt], f"{run}: attempt {attempt} began at step {step}, and {found[attempt]} was saved"
    failures = [event for event in events.read(folder) if event["kind"] == "failure"]
    struck = _lines(folder, "struck")
    assert len(failures) == len(struck), f"{run}: {struck}, and {failures}\n{output(folder)}"
    for failure, (_, rank, _, signum) in zip(failures, struck, strict=True):
        cause = "signal" if signum == signal.SIGKILL else "stopped"
        assert (failure["cause"], failure["ranks"]) == (cause, [rank]), f"{run}: {failure}"


def output(folder: Path) -> str:
    """Of all ranks in all attempts."""
    return "\n".join(f"---- {p}\n{p.read_text(errors='replace')}" for p in sorted((folder / "logs").rglob("*.log")))


def _lines(folder: Path, name: str) -> list[Any]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(words: Sequence[str] | None = None) -> int:
    """Carry out many runs; returns 1 if something did not hold in one of them."""
    parser = argparse.ArgumentParser("python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(words)
    began, struck, failed = time.monotonic(), Counter[str](), 0
    for number, run in enumerate(plan(options.runs, options.seed)):
        with TemporaryDirectory() as name:
            if (code := carry_out(run, Path(name))) > 128:  # the launcher was asked to stop, and so is this
                return code
            try:
                check(run, Path(name))
                assert code == 0, f"{run}: exit code {code}"
            except AssertionError as error:
                failed += 1
                print(error)
            for _, _, phase, signum in _lines(Path(name), "struck"):
                struck[f"{signal.Signals(signum).name} in {phase}"] += 1
        print(f"{number + 1:3}  {run}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{options.runs} runs, seed {options.seed}, {minutes:.1f} minutes: {failed} failed")
    print("; ".join(f"{count} {what}" for what, count in sorted(struck.items())))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
