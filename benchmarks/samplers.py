"""Regret of our named samplers against Optuna's own defaults after as many trials, over seeds.

    python -m benchmarks.samplers [--seeds 20] [--trials 100]

Ours and Optuna's draw different numbers from one seed, so seeds are pairs by their number alone. The null is Optuna's
sampler against itself with other seeds: what the comparison shows where there is nothing to show. Regrets do not depend
on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import optuna
from optuna.samplers import BaseSampler

from benchmarks.paired import Interval, median_interval
from benchmarks.sampler_tasks import FITS, FUNCTIONS, Task
from lightning_bharat.commands.table import table
from lightning_bharat.tuning.samplers import SAMPLERS, make_sampler

# Optuna's own defaults for these, and what is run for fewer seeds since a study takes seconds.
NAMES = ("tpe", "gp", "cmaes", "nsga2", "qmc", "random")
SLOW = "gp"


@dataclass(frozen=True)
class Result:
    """A sampler on a task.

    Attributes:
        ours, optuna: the median regret; of a fit, the median of the best loss.
        difference: ours less Optuna's, pair by pair.
        null: Optuna's with other seeds less Optuna's.
    """

    task: str
    sampler: str
    seeds: int
    trials: int
    ours: float
    optuna: float
    difference: Interval
    null: Interval

    @property
    def missed(self) -> bool:
        """Whether ours is worse for certain."""
        return self.difference.low > 0


def regret(task: Task, sampler: BaseSampler, trials: int) -> float:
    """How far the best of ``trials`` is from the task's minimum."""
    study = optuna.create_study(sampler=sampler)
    study.optimize(task.objective, n_trials=trials)
    return study.best_value - task.minimum


def compare(name: str, sampler: str, task: Task, seeds: int, trials: int) -> Result:
    """Run ours, Optuna's, and Optuna's with other seeds."""

    def regrets(make: Callable[[int], BaseSampler], first: int) -> list[float]:
        return [regret(task, make(seed), trials) for seed in range(first, first + seeds)]

    def theirs(seed: int) -> BaseSampler:
        return SAMPLERS[sampler](seed=seed)

    ours, peer, again = regrets(lambda seed: make_sampler(sampler, seed), 0), regrets(theirs, 0), regrets(theirs, seeds)
    return Result(
        name, sampler, seeds, trials, median(ours), median(peer), _difference(ours, peer), _difference(again, peer)
    )


def _difference(one: Sequence[float], other: Sequence[float]) -> Interval:
    return median_interval([a - b for a, b in zip(one, other, strict=True)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a sampler of ours is worse than Optuna's for certain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="half as many for gp, a third for fits; 6 at least")
    parser.add_argument("--trials", type=int, default=100, help="of a function; a fifth as many for fits")
    parser.add_argument("--tasks", nargs="+", default=[*FUNCTIONS, *FITS], choices=[*FUNCTIONS, *FITS])
    parser.add_argument(
        "--samplers", nargs="+", default=list(NAMES), choices=NAMES, help="for functions; fits take tpe"
    )
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results, began = [], time.perf_counter()
    for name in given.tasks:
        if name in FITS:
            results.append(compare(name, "tpe", FITS[name], max(6, given.seeds // 3), max(1, given.trials // 5)))
            continue
        for sampler in given.samplers:
            seeds = max(6, given.seeds // 2) if sampler == SLOW else given.seeds
            results.append(compare(name, sampler, FUNCTIONS[name], seeds, given.trials))
    print(report(results))
    print(json.dumps({"benchmark": "samplers", "seconds": time.perf_counter() - began, "results": _plain(results)}))
    return int(any(result.missed for result in results))


def report(results: Sequence[Result]) -> str:
    """A line for each."""
    head = ["task", "sampler", "seeds", "trials", "ours", "Optuna", "ours - Optuna", "null", ""]
    rows = []
    for r in results:
        counts, values = (str(r.seeds), str(r.trials)), (f"{r.ours:.4f}", f"{r.optuna:.4f}")
        rows.append([r.task, r.sampler, *counts, *values, _words(r.difference), _words(r.null), "missed" * r.missed])
    return table(head, rows)


def _words(interval: Interval) -> str:
    return f"{interval.median:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _plain(results: Sequence[Result]) -> list[dict]:
    return [asdict(result) | {"missed": result.missed} for result in results]


if __name__ == "__main__":
    sys.exit(main())
