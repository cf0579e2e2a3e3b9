"""What HealthMonitor costs, whether it is quiet where nothing is wrong, and how soon it finds what is.

    python -m benchmarks.health
    python -m benchmarks.health --part cost --layout data=1 --pairs 50

*cost*: three loops live in the same ranks and advance by one step in turns: with the monitor, without, and without once
more. Its own work is the CPU time of its hooks, as a share of that of a step of 50 ms, and of its threads in the time
of one; together it is to be below 0.5 %. The norm of the gradients, which clipping takes over, is no cost of its own.
The ratio of steps is shown beside it, and decides nothing: on two cores neighbouring steps differ by more.

*noise*: each detector sees 10,000 healthy steps that are simulated, many times; fewer than one false alarm in each run
is the goal.

*faults*: each is made on two real ranks; the record must have it within the time that docs/health.md states.

Exit code 1: a goal missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.health_cost import Cost, is_busy, measure
from benchmarks.health_faults import FAULTS, seconds_to
from benchmarks.health_noise import false_alarms
from lightning_bharat import Layout
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import table

PARTS = ("cost", "noise", "faults")
LAYOUTS = ("data=1", "data=2", "tensor=2")


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; returns the exit code."""
    options = _options(words)
    server = WarmServer((*PRELOAD, "benchmarks.health_cost", "benchmarks.health_faults"))
    found: dict[str, Any] = {"benchmark": "health", "torch": torch.__version__, "cores": os.cpu_count()}
    met = True
    for part in options.part or PARTS:
        lines, found[part], fine = _PARTS[part](options, server)
        met = met and fine
        print(lines, flush=True)
    print(json.dumps(found))
    return 0 if met else 1


def _cost(options: argparse.Namespace, server: WarmServer) -> tuple[str, Any, bool]:
    costs: list[Cost] = []
    for layout in options.layout or LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            ranks = Layout.parse(layout).devices
            costs.append(server.run(measure, ranks, layout, options.pairs, folder, timeout=1800)[0])
    head = ["layout", "step", "its work", "hooks", "their work", "threads in 50 ms", "share"]
    head += ["with/without [95 %]", "null [95 %]", "goal"]
    rows = [
        [
            c.layout,
            *(f"{ms:.3f} ms" for ms in (c.step_ms, c.cpu_ms, c.hooks_ms, c.own_ms, c.threads_ms)),
            *(f"{c.share:.2%}", f"{c.ratio}", f"{c.null}{' void' if is_busy(c) else ''}", c.verdict),
        ]
        for c in costs
    ]
    every = [{**asdict(c), "share": c.share, "verdict": c.verdict} for c in costs]
    return table(head, rows), every, all(c.verdict == "met" for c in costs)


def _noise(options: argparse.Namespace, server: WarmServer) -> tuple[str, Any, bool]:
    alarms = false_alarms(options.steps, options.seeds)
    rows = [[name, f"{len(each)}", f"{sum(each) / len(each):.3f}", f"{max(each)}"] for name, each in alarms.items()]
    total = sum(sum(each) / len(each) for each in alarms.values())
    rows.append(["all", f"{options.seeds}", f"{total:.3f}", ""])
    return table(["detector", "runs", "false alarms in a run", "most"], rows), alarms, total < 1


def _faults(options: argparse.Namespace, server: WarmServer) -> tuple[str, Any, bool]:
    found = {name: (FAULTS[name], *seconds_to(name, server)) for name in options.fault or FAULTS}
    rows = [
        [name, fault.kind, "not found" if took is None else f"{took:.2f} s", f"{fault.within:.1f} s", words[:90]]
        for name, (fault, took, words) in found.items()
    ]
    fine = all(took is not None and took <= fault.within for fault, took, _ in found.values())
    every = {name: {"seconds": took, "within": fault.within} for name, (fault, took, _) in found.items()}
    return table(["fault", "kind", "found after", "stated", "words"], rows), every, fine


_PARTS = {"cost": _cost, "noise": _noise, "faults": _faults}


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.health", description=__doc__, formatter_class=form)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given again (default: all)")
    parser.add_argument("--layout", action="append", help=f"may be given again (default: {' '.join(LAYOUTS)})")
    parser.add_argument("--pairs", type=int, default=100, help="rounds of cost (default: 100)")
    parser.add_argument("--steps", type=int, default=10_000, help="of a simulated run (default: 10000)")
    parser.add_argument("--seeds", type=int, default=20, help="simulated runs (default: 20)")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="may be given again (default: all)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
