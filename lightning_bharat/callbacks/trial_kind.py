"""Which trial a callback has been given, and where it can't be pruned: said before anything trains."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl

from lightning_bharat.strategies._lightning import fits_in_children
from lightning_bharat.strategies.torchft import TorchFTStrategy

REPLAYED = ("FixedTrial", "FrozenTrial")  # their reports go nowhere, and they are never pruned


def check(trial: Any) -> None:
    """Raise for what can't be pruned anywhere.

    Raises:
        TypeError: ``trial`` is none of Optuna's, or one that calls all ranks itself.
        ValueError: its study has several objectives.
    """
    if trial is None or is_remote(trial) or is_replayed(trial):
        return
    if not is_of_study(trial):
        raise TypeError(
            f"trial={trial!r}: expected the optuna.Trial that study.optimize gives to the objective, or None for the "
            "trial of `bharat tune`; write OptunaPruning(trial, monitor=...), and in a config only monitor"
        )
    if len(trial.study.directions) > 1:
        raise ValueError(several_objectives(trial))


def several_objectives(trial: Any) -> str:
    """Why a trial of a study with several objectives is not pruned, and what can be done."""
    return (
        f"trial {trial.number} is one of a study with several objectives: Optuna compares intermediate values of one "
        "objective only, so it can't be pruned. Leave OptunaPruning out; or make one objective the study's and the "
        "others constraints (trial.set_constraint); or end runs that get no better by Lightning's EarlyStopping"
    )


def is_of_study(trial: Any) -> bool:
    """Whether it is Optuna's own, of a study in this process or in the one that started it."""
    optuna = sys.modules.get("optuna")  # who has a trial of it has imported it; the others need not have it
    return optuna is not None and isinstance(trial, optuna.Trial)


def is_remote(trial: Any) -> bool:
    """Whether its study is the controller's of ``bharat tune``."""
    return hasattr(trial, "note_pruned")


def is_replayed(trial: Any) -> bool:
    """Whether an objective is called again with known parameters."""
    return type(trial).__name__ in REPLAYED and hasattr(trial, "should_prune")


def current() -> Any:
    """The trial of ``bharat tune`` that this process is a rank of, or ``None``."""
    # The package imports Optuna, which an ordinary run may not have; a rank of a trial has imported it.
    module = sys.modules.get("lightning_bharat.tuning.current")
    return None if module is None else module.trial()


def refusal(trial: Any, trainer: pl.Trainer) -> str | None:
    """Why this trainer can't prune ``trial``, if it can't."""
    if isinstance(trainer.strategy, TorchFTStrategy) and trial is not None:
        return (
            "OptunaPruning: copies of a module under bharat_torchft decide for themselves, so that they would stop at "
            "different steps; leave it out, or train under bharat_hybrid"
        )
    # Ranks that are children have copies of the trial of the process that started them, which each host has.
    studies = trainer.num_nodes if fits_in_children(trainer) else trainer.world_size
    if studies == 1 or not is_of_study(trial):
        return None
    who = "hosts" if fits_in_children(trainer) else "ranks"
    return (
        f"OptunaPruning: each of the {studies} {who} runs this whole script, and so a study.optimize of its own: their "
        "trials have other numbers, and other parameters where the sampler is not seeded. Let one process have the "
        "study and give it ranks: write `bharat tune` for a config, lightning_bharat.tuning.tune(objective, "
        'n_trials=...) in the place of study.optimize(objective, ...), or strategy="ddp_fork" on one host, whose ranks '
        'are children of the process that has the study (on CPUs; on GPUs "ddp_spawn")'
    )
