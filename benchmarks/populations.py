"""Populations that are explored by PB2 against PBT, on trainings that are formulas, over seeds.

    pip install 'lightning-bharat[ray]'
    python -m benchmarks.populations [--seeds 20] [--generations 10]

A member's metric grows by at most 1 in each generation: the more, the nearer its values are to the best ones, of which
the first moves through half of its range in the course of the training. What is compared is the best metric at the end,
of populations of four that begin with the same values. The null is PBT with other draws, from the same beginning.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler

from benchmarks.paired import Interval, median_interval
from lightning_bharat.commands.table import table
from lightning_bharat.tuning.for_population import bandit_for
from lightning_bharat.tuning.members import Members
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.space import SearchSpace


def space_of(numbers: int) -> SearchSpace:
    """Of so many, each over four decades."""
    return SearchSpace({f"x{place}": FloatDistribution(1e-4, 1.0, log=True) for place in range(numbers)})


def gain(trial: optuna.Trial, generations: int) -> float:
    """Of a generation, up to 1."""
    decades = np.log10(list(trial.params.values()))
    best = np.full(len(decades), -1.5)
    best[0] = -3 + 2 * trial.user_attrs["generation"] / max(1, generations - 1)
    return float(np.exp(-np.mean((decades - best) ** 2)))


def best_metric(explorer: str, numbers: int, generations: int, seed: int, draws: int) -> float:
    """What a population has reached at its end.

    Args:
        seed: of its beginning.
        draws: seed of its copies.
    """
    how, space = Population(4, 1, mode="sync", explorer=explorer), space_of(numbers)  # type: ignore[arg-type]
    members = Members(how, space, Path("nowhere"), generations, draws, bandit_for(how, space))
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=seed))
    while (trial := members.next(study)) is not None:
        parent = trial.user_attrs.get("parent")
        begun = 0.0 if parent is None else study.trials[parent].value or 0.0
        study.tell(trial, begun + gain(trial, generations))
    return study.best_value


def compare(numbers: int, seeds: int, generations: int) -> dict[str, object]:
    """PB2, PBT, and PBT with other draws."""

    def metrics(explorer: str, first: int) -> list[float]:
        return [best_metric(explorer, numbers, generations, seed, first + seed) for seed in range(seeds)]

    pb2, pbt, again = metrics("pb2", 0), metrics("pbt", 0), metrics("pbt", seeds)
    more = [a - b for a, b in zip(pb2, pbt, strict=True)]
    return {
        "numbers": numbers,
        "pb2": median(pb2),
        "pbt": median(pbt),
        "more": median_interval(more),
        "better": sum(each > 0 for each in more),
        "null": median_interval([a - b for a, b in zip(again, pbt, strict=True)]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for one and for three numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="6 at least")
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 3], help="that are searched")
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.process_time()
    results = [compare(numbers, given.seeds, given.generations) for numbers in given.numbers]
    print(report(results, given.seeds))
    seconds = time.process_time() - began
    print(json.dumps({"benchmark": "populations", "seconds": seconds, "results": results}, default=vars))
    return 0


def report(results: Sequence[dict[str, object]], seeds: int) -> str:
    """A line for each."""
    head = ["numbers", "PB2", "PBT", "PB2 - PBT", f"better, of {seeds}", "null"]
    rows = [
        [str(r["numbers"]), f"{r['pb2']:.2f}", f"{r['pbt']:.2f}", words(r["more"]), str(r["better"]), words(r["null"])]
        for r in results
    ]
    return table(head, rows)


def words(interval: object) -> str:
    """As ``0.1 to 0.3``."""
    assert isinstance(interval, Interval)
    return f"{interval.low:.2f} to {interval.high:.2f}"


if __name__ == "__main__":
    sys.exit(main())
