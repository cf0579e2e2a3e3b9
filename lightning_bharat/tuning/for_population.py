"""Whether a population can be trained as it was asked for, and what then proposes its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning.improvements import numbers_of
from lightning_bharat.tuning.members import Members
from lightning_bharat.tuning.options import nearest
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.space import SearchSpace
from lightning_bharat.tuning.study_config import StudyConfig

if TYPE_CHECKING:
    from lightning_bharat.tuning.bandit import Bandit


def members_for(
    population: Population,
    config: StudyConfig | None,
    space: SearchSpace | None,
    folder: Path,
    seed: int,
    n_trials: int | None,
    others: Mapping[str, Any],
) -> tuple[Members, int]:
    """What proposes the generations of a population, and how many trials they are at most.

    Args:
        others: the arguments ``monitor``, ``pruner`` and ``sampler``, as they were given.

    Raises:
        BadInput: what does not go together.
    """
    if config is None or space is None:
        raise BadInput("population trains a LightningCLI project: write its config in the place of an objective")
    _check_others(others)
    unit = population.unit
    if f"trainer.max_{unit}" in space.distributions:
        raise BadInput(f"trainer.max_{unit} is searched, and in a population it is the length of all members' training")
    for key in population.explore or ():
        if key not in space.distributions:
            near = nearest(key, space.distributions)
            raise BadInput(f"population: explore names {key!r}, which the space does not have.{near}")
    length = config.length(unit)
    most = population.size * population.generations(length)
    if n_trials is not None and n_trials > most:
        raise BadInput(
            f"n_trials={n_trials}: {population.size} members over trainer.max_{unit}={length} in intervals of "
            f"{population.interval} are {most} trials; leave n_trials out, or train longer"
        )
    return Members(population, space, folder, length, seed, bandit_for(population, space)), n_trials or most


def bandit_for(population: Population, space: SearchSpace) -> Bandit | None:
    """What explores a population by what it has shown; ``None``: nothing does.

    Raises:
        BadInput: it has no numbers to choose, or Ray is not installed.
    """
    if population.explorer == "pbt":
        return None
    if not numbers_of(space, population.explore):
        explored = ", ".join(population.explore or space.distributions)
        raise BadInput(
            f'population: explorer="pb2" chooses numbers that all points have, and of {explored} none is one: write '
            'explorer="pbt"'
        )
    try:
        from lightning_bharat.tuning.bandit import Bandit
    except ImportError as error:  # Ray's own words are one where a library of its Tune is missing
        raise BadInput(
            f'population: explorer="pb2" is that of Ray, on scikit-learn, and {error}; install both: '
            "pip install 'lightning-bharat[ray]'; or write explorer=\"pbt\""
        ) from error
    return Bandit(space, population.explore)


def _check_others(others: Mapping[str, Any]) -> None:
    sampler, monitor = others["sampler"], others["monitor"]
    if not isinstance(monitor, str) and isinstance(monitor, Sequence) and len(monitor) > 1:
        raise BadInput(f"monitor={monitor!r}: members of a population are ranked by one metric; give one")
    if others["pruner"] not in (None, "none"):
        raise BadInput(
            f"pruner={others['pruner']!r}: the population itself replaces its poor members; leave pruner out"
        )
    if (sampler.get("name") if isinstance(sampler, Mapping) else sampler) == "grid":
        raise BadInput('sampler="grid": the sampler draws the first generation of a population; write sampler="random"')
