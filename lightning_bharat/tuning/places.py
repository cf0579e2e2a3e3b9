"""Which generation of which member of a population a trial is: its attributes say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from optuna.trial import FrozenTrial

MEMBER, GENERATION, PARENT = "member", "generation", "parent"

Places = Mapping[tuple[int, int], FrozenTrial]


def place_of(trial: FrozenTrial) -> tuple[int, int] | None:
    """Member and generation; ``None``: it is no population's."""
    attrs = trial.user_attrs
    return (attrs[MEMBER], attrs[GENERATION]) if MEMBER in attrs and GENERATION in attrs else None


def by_place(trials: Iterable[FrozenTrial]) -> dict[tuple[int, int], FrozenTrial]:
    """The trials of a population by member and generation."""
    return {place: trial for trial in trials if (place := place_of(trial)) is not None}
