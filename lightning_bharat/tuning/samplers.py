"""Samplers by name: what suggests the next point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from lightning_bharat.tuning._optuna import made
from lightning_bharat.tuning.grid import Grid, grid_of
from lightning_bharat.tuning.options import check, named
from lightning_bharat.tuning.seeded import SeededByTrial

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "grid": Grid,
    "random": RandomSampler,
    "qmc": QMCSampler,
    "tpe": TPESampler,
    "gp": GPSampler,
    "cmaes": CmaEsSampler,
    "nsga2": NSGAIISampler,
    "nsga3": NSGAIIISampler,
}

# The first is given by tune(); limits take the place of the second, which Optuna is giving up; the grid has a space.
_OURS = ("seed", "constraints_func", "values")


def make_sampler(
    sampler: str | Mapping[str, Any] | BaseSampler,
    seed: int | None = None,
    space: Any = None,
    directions: Sequence[str] = ("minimize",),
    n_trials: int | None = None,
) -> BaseSampler:
    """What suggests a study's points.

    A named sampler draws by the seed and the trial's number: a study that is killed and goes on suggests what it would
    have suggested without the kill. It learns from trials that broke a limit, also from those that failed by it.

    Args:
        sampler: ``"grid"``, ``"random"``, ``"qmc"`` (scrambled Sobol points), ``"tpe"``, ``"gp"``, ``"cmaes"``,
            ``"nsga2"`` or ``"nsga3"``; or a dict of such a name and options of Optuna's class
            (``{"name": "tpe", "n_startup_trials": 5}``); or a sampler of Optuna's, which is taken as it is.
        seed: the same seed, the same points. None: others each time.
        space: a ``SearchSpace``, or distributions or values by name. The grid needs it; CMA-ES is checked against it.
        directions: ``"minimize"`` or ``"maximize"`` for each objective.
        n_trials: how many trials the study has, to say when a sampler can't learn in so few.

    Returns:
        A sampler for ``optuna.create_study``.

    Raises:
        TypeError: ``sampler`` is neither a name, nor a dict, nor a sampler.
        ValueError: an unknown name or option, or a sampler that does not suit the space or the objectives.
    """
    if isinstance(sampler, BaseSampler):
        return sampler
    name, options = named("sampler", sampler, SAMPLERS)
    make = SAMPLERS[name]
    check("sampler", name, make, options, _OURS)
    if name == "grid":
        return Grid(grid_of(space), seed)
    if name == "qmc":
        # Without scrambling the points are the same for every seed. Its place in the sequence is kept in the study, so
        # it is one sampler for all trials; its first point, and what depends on conditions, are drawn at random.
        rest = SeededByTrial("random", lambda seed: RandomSampler(seed=seed), seed)
        quiet = {"warn_asynchronous_seeding": False}
        return made(QMCSampler, {"scramble": True, "independent_sampler": rest, **quiet, **options, "seed": seed})
    if name == "cmaes":
        _check_cmaes(space, directions)
    if name in ("nsga2", "nsga3"):
        _check_population(name, options.get("population_size", 50), n_trials)
    return SeededByTrial(name, lambda seed: made(make, {**options, "seed": seed}), seed, ranked=name == "cmaes")


def _check_cmaes(space: Any, directions: Sequence[str]) -> None:
    if len(directions) > 1:
        raise ValueError(
            f'sampler="cmaes" has one objective, and there are {len(directions)}: write sampler="tpe", "gp", "nsga2" '
            'or "nsga3"'
        )
    distributions = getattr(space, "distributions", space)
    if not isinstance(distributions, Mapping) or not distributions:
        return
    numbers = [name for name, each in distributions.items() if not isinstance(each, (CategoricalDistribution, list))]
    if not numbers:
        raise ValueError(
            f'sampler="cmaes" moves numbers, and {", ".join(distributions)} are choices, which it would draw at '
            'random: write sampler="tpe", or give ranges'
        )
    if len(numbers) == 1:
        raise ValueError(
            f'sampler="cmaes" needs two numbers at least, and {numbers[0]} is the only one: write sampler="tpe" or "gp"'
        )


def _check_population(name: str, population: int, n_trials: int | None) -> None:
    if n_trials is not None and n_trials <= population:
        warnings.warn(
            f'sampler="{name}" draws its first {population} trials at random, and the study has {n_trials}: write '
            f'sampler={{"name": "{name}", "population_size": {max(2, n_trials // 5)}}}, or sampler="tpe"',
            stacklevel=3,
        )
