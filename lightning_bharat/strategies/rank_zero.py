"""What is found in a dry run of the person's step, by one rank for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.strategies.dry_step import dry_step, first_batch

if TYPE_CHECKING:
    from lightning_bharat.plan.observe import Step
    from lightning_bharat.strategies.hybrid import HybridStrategy

Find = Callable[["Step", Any], dict[str, Any]]


def found_by_rank_zero(
    strategy: HybridStrategy, trainer: pl.Trainer, find: Find, kind: type[PlanError], proving: str, instead: str
) -> dict[str, Any]:
    """What ``find(step, batch)`` returns on rank 0, on every rank. All ranks must call it.

    Args:
        find: from the training step and a batch to something that JSON can hold.
        kind: of the error.
        proving: what is proven, and what to write ``instead``, where ``find`` raises what no one foresaw.

    Raises:
        PlanError: of ``kind``, on all ranks with the same words.
    """
    answer, batch = "", first_batch(trainer)  # on every rank: looking at a loader may change it
    if strategy.is_global_zero:
        with isolate_rng():
            answer = json.dumps(_found(strategy, trainer, find, batch, proving, instead))
    told = json.loads(strategy.broadcast(answer))
    if "error" in told:
        raise kind(told["error"])
    return told["found"]


def _found(
    strategy: HybridStrategy, trainer: pl.Trainer, find: Find, batch: Any, proving: str, instead: str
) -> dict[str, Any]:
    try:
        with strategy.alone():
            return {"found": find(dry_step(trainer), batch)}
    except PlanError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__} when {proving} was proven: {error}. Write {instead}"}
