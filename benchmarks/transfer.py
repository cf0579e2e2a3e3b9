"""Trials that earlier studies save, on related tasks; and what they cost on unrelated ones.

    python -m benchmarks.transfer [--seeds 20] [--base tpe]

For each seed an earlier task and a new one are drawn. Saved is the share of a cold study's trials that are not needed
to come as far as it came with all of them; 0 where that is not reached in as many. On unrelated earlier tasks (waves,
and the new one turned around) the regret after all trials is compared with the cold study's. The null beside both is a
second cold study with another seed. All is determined by the seeds: figures do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler

from benchmarks.paired import Interval, median_interval
from benchmarks.transfer_tasks import FAMILIES, Objective, opposite, waves
from lightning_bharat.commands.table import table
from lightning_bharat.tuning.samplers import make_sampler
from lightning_bharat.tuning.transfer import TransferSampler

AIM = 0.5  # of the trials that are saved on related tasks
SOURCE_TRIALS = 60
UNRELATED = ("waves", "opposite")
_FLOOR = 1e-12  # regrets are compared by their logarithms


@dataclass(frozen=True)
class Seed:
    """What studies of one seed came to: the best value after each trial.

    Attributes:
        cold, again: without sources, by two seeds.
        related, waves, opposite: with one earlier study each.
        both: with the waves and the related one.
        gp: Optuna's Gaussian process without sources; empty if it was not asked for.
    """

    cold: list[float]
    again: list[float]
    related: list[float]
    both: list[float]
    waves: list[float]
    opposite: list[float]
    gp: list[float]


def curves(name: str, base: str, with_gp: bool, seed: int) -> Seed:
    """Run all studies of a seed."""
    _quiet()
    family = FAMILIES[name]
    target, minimum = family.make(100 * seed)
    earlier = {
        "related": family.make(100 * seed + 1)[0],
        "waves": waves(family, seed),
        "opposite": opposite(family, 100 * seed),
    }
    sources = {
        kind: _study(objective, make_sampler("tpe", 1000 + seed), SOURCE_TRIALS) for kind, objective in earlier.items()
    }

    def curve(sampler: BaseSampler) -> list[float]:
        study = _study(target, sampler, family.trials)
        return [float(v) for v in np.minimum.accumulate([trial.value for trial in study.trials]) - minimum]

    def after(*kinds: str) -> list[float]:
        return curve(TransferSampler([sources[kind] for kind in kinds], base, seed))

    return Seed(
        curve(make_sampler(base, seed)),
        curve(make_sampler(base, 500 + seed)),
        after("related"),
        after("waves", "related"),
        after("waves"),
        after("opposite"),
        curve(make_sampler("gp", seed)) if with_gp else [],
    )


def _study(objective: Objective, sampler: BaseSampler, trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=trials)
    return study


def _quiet() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


@dataclass(frozen=True)
class Saved:
    """The share of trials that one way saves on the tasks of a family."""

    family: str
    way: str
    share: Interval
    null: Interval

    @property
    def missed(self) -> bool:
        """Whether related studies save less than half of the trials."""
        return self.way in ("related", "both") and self.share.median < AIM


@dataclass(frozen=True)
class Lost:
    """The logarithm to base 10 of the regret after unrelated studies over the cold one's."""

    family: str
    way: str
    factor: Interval
    null: Interval

    @property
    def missed(self) -> bool:
        """Whether it is worse for certain."""
        return self.factor.low > 0


def saved(family: str, way: str, seeds: Sequence[Seed]) -> Saved:
    """How much earlier ``way`` comes to what the cold study found."""

    def shares(name: str) -> Interval:
        return median_interval([share_saved(seed.cold, getattr(seed, name)) for seed in seeds])

    return Saved(family, way, shares(way), shares("again"))


def share_saved(cold: Sequence[float], other: Sequence[float]) -> float:
    """The share of ``cold``'s trials that ``other`` does not need to come as far.

    >>> share_saved([5, 4, 4, 3], [4, 3, 3, 1]), share_saved([5, 4, 4, 3], [6, 5, 4, 4])
    (0.5, 0.0)
    """
    needed = next((i for i, value in enumerate(other, 1) if value <= cold[-1]), len(cold))
    return 1 - needed / len(cold)


def lost(family: str, way: str, seeds: Sequence[Seed]) -> Lost:
    """How the regret after ``way`` compares with the cold study's."""

    def factors(name: str) -> Interval:
        return median_interval([_log(getattr(seed, name)[-1]) - _log(seed.cold[-1]) for seed in seeds])

    return Lost(family, way, factors(way), factors("again"))


def _log(value: float) -> float:
    return float(np.log10(max(value, _FLOOR)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when related studies save too little, or unrelated ones cost something for certain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="6 at least")
    parser.add_argument(
        "--first", type=int, default=0, help="the first seed: 100 gives tasks that nobody has looked at"
    )
    parser.add_argument("--base", default="tpe", help="the sampler without sources")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--gp", action="store_true", help="Optuna's Gaussian process without sources as well")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    began, everything = time.perf_counter(), list[Seed]()
    helped, hurt = list[Saved](), list[Lost]()
    for name in given.families:
        seeds = _each(
            partial(curves, name, given.base, given.gp), range(given.first, given.first + given.seeds), given.processes
        )
        helped += [saved(name, way, seeds) for way in ("related", "both", *["gp"] * given.gp)]
        hurt += [lost(name, way, seeds) for way in UNRELATED]
        everything += seeds
        print(report(helped[-2 - given.gp :], hurt[-2:]), end="\n\n", flush=True)
    hurt += [lost("all", way, everything) for way in UNRELATED]
    print(report([], hurt[-2:]))
    results = {"saved": [asdict(r) for r in helped], "lost": [asdict(r) for r in hurt]}
    print(json.dumps({"benchmark": "transfer", "base": given.base, "seconds": time.perf_counter() - began, **results}))
    return int(any(result.missed for result in [*helped, *hurt]))


def _each(run: Callable[[int], Seed], seeds: Sequence[int], processes: int) -> list[Seed]:
    if processes == 1:
        return [run(seed) for seed in seeds]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(run, seeds))


def report(helped: Sequence[Saved], hurt: Sequence[Lost]) -> str:
    """A table of the share of trials saved, and of the logarithm to base 10 of regret / cold."""
    rows = [[r.family, r.way, "saved", _words(r.share), _words(r.null), "missed" * r.missed] for r in helped]
    rows += [[r.family, r.way, "lost", _words(r.factor), _words(r.null), "missed" * r.missed] for r in hurt]
    return table(["task", "earlier", "", "median", "null", ""], rows)


def _words(interval: Interval) -> str:
    return f"{interval.median:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


if __name__ == "__main__":
    sys.exit(main())
