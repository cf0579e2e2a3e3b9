"""Pruners by name: what ends a trial that is not worth its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)

from lightning_bharat.tuning._optuna import made
from lightning_bharat.tuning.options import check, named


def _patient(patience: int, pruner: Any = "none", min_delta: float = 0.0) -> BasePruner:
    inner = make_pruner(pruner)
    # Optuna's takes None for: end a trial that got worse, whatever others did.
    return PatientPruner(None if isinstance(inner, NopPruner) else inner, patience, min_delta)


PRUNERS: dict[str, Callable[..., BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "percentile": PercentilePruner,
    "asha": SuccessiveHalvingPruner,
    "hyperband": HyperbandPruner,
    "threshold": ThresholdPruner,
    "patient": _patient,
    "wilcoxon": WilcoxonPruner,
}


def make_pruner(
    pruner: str | Mapping[str, Any] | BasePruner | None, directions: Sequence[str] = ("minimize",)
) -> BasePruner:
    """What ends a study's poor trials early.

    Args:
        pruner: ``"median"``, ``"percentile"``, ``"asha"`` (asynchronous successive halving), ``"hyperband"``,
            ``"threshold"``, ``"patient"`` (waits for ``patience`` reports that are all worse than those before, then
            asks its own ``pruner``, or ends the trial if it has none), ``"wilcoxon"`` (whose steps are folds or
            instances, not epochs), or ``"none"``; or a dict of such a name and options of Optuna's class
            (``{"name": "asha", "min_resource": 2}``); or a pruner of Optuna's. None: no pruning.
        directions: ``"minimize"`` or ``"maximize"`` for each objective.

    Returns:
        A pruner for ``optuna.create_study``.

    Raises:
        TypeError: ``pruner`` is neither a name, nor a dict, nor a pruner.
        ValueError: an unknown name or option, a missing option, or several objectives.
    """
    found = pruner if isinstance(pruner, BasePruner) else _make("none" if pruner is None else pruner)
    if len(directions) > 1 and not isinstance(found, NopPruner):
        raise ValueError(
            f"pruner={pruner!r} with {len(directions)} objectives: Optuna can't prune there, since a trial's curve has "
            "one value a step. Write pruner=None; or keep one objective and make limits of the others "
            '(limits=[Limit("peak_memory_bytes", "2 GiB")]); or monitor a weighted sum that your module logs'
        )
    return found


def _make(given: str | Mapping[str, Any]) -> BasePruner:
    name, options = named("pruner", given, PRUNERS)
    make = PRUNERS[name]
    check("pruner", name, make, options, ())
    if name == "threshold" and not options:
        raise ValueError('pruner "threshold" needs upper or lower: write {"name": "threshold", "upper": 10.0}')
    return made(make, options)
