"""Which earlier studies a new one may learn from: what can't be of use is refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning.earlier import Earlier, EarlierStudy, began, read_earlier
from lightning_bharat.tuning.grid import Grid
from lightning_bharat.tuning.space import SearchSpace
from lightning_bharat.tuning.transfer import TransferSampler

Transfer = EarlierStudy | Sequence[EarlierStudy]


def earlier_studies(
    transfer: Transfer, name: str, storage: BaseStorage, directions: Sequence[str], space: SearchSpace | None
) -> list[Earlier]:
    """What ``transfer`` found.

    Args:
        transfer: a study, its folder, or its storage and name; or several of them.
        name: of the new study.
        storage: of the new study.
        directions: of the new study.
        space: of the new study; ``None`` for an objective, whose parameters nobody knows before it has run.

    Raises:
        BadInput: a study has no complete trial, no parameter of the space, or other directions, or is the new one.
        StorageError: there is none.
    """
    if len(directions) != 1:
        raise BadInput(
            f"transfer ranks trials by one objective, and this study has {len(directions)}; leave transfer out, or "
            "write points of earlier studies"
        )
    found = []
    for i, source in enumerate(_listed(transfer)):
        argument = f"transfer[{i}]"
        try:
            earlier = read_earlier(source, argument)
        except ValueError as error:
            raise BadInput(str(error)) from error
        _refuse_itself(earlier, argument, name, storage)
        _refuse_other_direction(earlier, argument, directions[0])
        _refuse_other_space(earlier, argument, space)
        found.append(earlier)
    return found


def sampler_after(earlier: Sequence[Earlier], base: BaseSampler, seed: int | None) -> BaseSampler:
    """``base``, that learns from ``earlier`` studies if there are any."""
    if not earlier:
        return base
    if isinstance(base, (Grid, TransferSampler)):
        does = "tries all points, whatever was found before" if isinstance(base, Grid) else "has its own earlier ones"
        raise BadInput(f"transfer: the sampler {type(base).__name__} {does}; leave one of the two out")
    return TransferSampler(earlier, base, seed)


def _listed(transfer: Any) -> list[EarlierStudy]:
    if isinstance(transfer, (str, Path, tuple, optuna.Study)):
        return [transfer]
    return list(transfer)


def _refuse_itself(earlier: Earlier, argument: str, name: str, storage: BaseStorage) -> None:
    if earlier.name != name or name not in optuna.get_all_study_names(storage):
        return
    if began(optuna.load_study(study_name=name, storage=storage)) == earlier.began:
        raise BadInput(
            f"{argument}: {name!r} is this study itself, which knows its own trials; write another, or another "
            "study_name to begin a new study with what this one found"
        )


def _refuse_other_direction(earlier: Earlier, argument: str, direction: str) -> None:
    before = earlier.direction.name.lower()
    if before != direction:
        raise BadInput(
            f"{argument}: the study {earlier.name!r} was to {before} its value, and this one is to {direction}: they "
            "measure different things. If the best of one is the best of the other, write "
            "sampler=TransferSampler([...]), which turns it around"
        )


def _refuse_other_space(earlier: Earlier, argument: str, space: SearchSpace | None) -> None:
    if space is None:
        return
    had, have = earlier.distributions, space.distributions

    def is_shared(key: str) -> bool:
        kinds = {isinstance(each[key], CategoricalDistribution) for each in (had, have)}
        return len(kinds) == 1

    if not any(map(is_shared, had.keys() & have.keys())):
        raise BadInput(
            f"{argument}: the study {earlier.name!r} searched {', '.join(had)}, and this one {', '.join(have)}: no "
            "parameter is in both; leave it out"
        )
