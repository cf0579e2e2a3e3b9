"""The plan of a strategy's module: found and proven on rank 0, the same plain data on all ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.stored import is_checkpoint
from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.find import find_plan, structural_plan
from lightning_bharat.plan.layout import LayoutError
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.propose import named_styles
from lightning_bharat.strategies import _lightning_resume
from lightning_bharat.strategies.choose import choose_schedule
from lightning_bharat.strategies.rank_zero import found_by_rank_zero
from lightning_bharat.strategies.schedule import KINDS

if TYPE_CHECKING:
    from lightning_bharat.plan.observe import Step
    from lightning_bharat.strategies.hybrid import HybridStrategy


def plan_for(strategy: HybridStrategy, trainer: pl.Trainer, module: pl.LightningModule) -> ModelPlan:
    """The strategy's plan, checked against its layout. All ranks must call it.

    Raises:
        PlanError: on all ranks with the same words.
        LayoutError: the tensor size does not fit the model.
    """
    given = strategy.options.plan
    warn_unused(strategy)
    if strategy.layout.tensor == strategy.layout.pipeline == 1:
        if isinstance(given, ModelPlan):
            return given
        if given is not None:
            named_styles(module, given)  # refuses names that there are not
            strategy.choices["plan"] = "not used: tensor_parallel_size is 1"
        return structural_plan(module)
    plan = given if isinstance(given, ModelPlan) else _found(strategy, trainer, module)
    strategy.layout.check(plan)
    if strategy.layout.pipeline > 1 and plan.apart:
        raise PlanError(
            f"pipeline_parallel_size={strategy.layout.pipeline}: the blocks of {plan.blocks!r} can't lie on different "
            f"stages: {plan.apart}. Write pipeline_parallel_size=1, and use data_parallel_size or tensor_parallel_size"
        )
    if strategy.layout.pipeline > 1 and strategy.options.schedule == "auto":
        strategy.predicted = choose_schedule(strategy, trainer, module, plan)
        strategy.schedule = strategy.predicted[0].name if strategy.predicted else "1F1B"
    _check_stages(strategy, plan)
    return plan


def _check_stages(strategy: HybridStrategy, plan: ModelPlan) -> None:
    ranks, schedule = strategy.layout.pipeline, strategy.schedule
    stages = ranks * KINDS[schedule].each if ranks > 1 else 1
    if stages > plan.depth:
        raise LayoutError(
            f"pipeline_parallel_size={ranks} with schedule={schedule!r}, {stages // ranks} stages on each rank, needs "
            f"{stages} blocks, and {plan.blocks!r} has {plan.depth}; write schedule='1F1B', or at most "
            f"pipeline_parallel_size={plan.depth * ranks // stages}"
        )


def _found(strategy: HybridStrategy, trainer: pl.Trainer, module: pl.LightningModule) -> ModelPlan:
    def find(step: Step, batch: Any) -> dict[str, Any]:
        plan = find_plan(module, step, batch, strategy.layout.tensor, strategy.options.plan)
        if strategy.layout.pipeline > 1:
            plan = replace(plan, costs=_measured(_lightning_resume.ckpt_path(trainer), plan) or plan.costs)
        return plan.to_dict()

    instead = "tensor_parallel_size=1: data ranks need no plan"
    return ModelPlan.from_dict(found_by_rank_zero(strategy, trainer, find, PlanError, "a tensor cut", instead))


def _measured(path: Any, plan: ModelPlan) -> tuple[int, ...]:
    """Costs that the run which is resumed has measured of the same blocks; none if it has not."""
    if not path or not is_checkpoint(Path(path)):
        return ()
    try:
        saved = Manifest.read(Path(path)).plan or {}
    except CheckpointError:  # to be said where the checkpoint is read
        return ()
    alike = saved.get("blocks") == plan.blocks and len(saved.get("kinds", ())) == plan.depth
    return tuple(saved.get("costs", ())) if alike else ()


def used(strategy: HybridStrategy, plan: ModelPlan, what: str) -> bool:
    """Whether ``sequence`` or ``loss`` parallelism is used; says why in the strategy's choices.

    Raises:
        PlanError: it is asked for, and not proven.
    """
    asked, problem = getattr(strategy.options, f"{what}_parallel"), getattr(plan, what)
    if what == "sequence" and strategy.layout.context > 1:
        problem = "context ranks divide the sequence"
    if what == "sequence" and strategy.layout.expert > 1:
        problem = problem or "tensor peers would sum gradients of experts, which are divided apart from their block"
    if asked is True and problem:
        raise PlanError(
            f'{what}_parallel=True: not proven right for this model: {problem}; write {what}_parallel="auto"'
        )
    use = asked is not False and not problem
    strategy.choices[f"{what}_parallel"] = "used, proven" if use else f"not used: {problem or 'as asked'}"
    return use


def warn_unused(strategy: HybridStrategy) -> None:
    """Say what was asked for and has no meaning without tensor ranks."""
    for what in ("sequence_parallel", "loss_parallel"):
        if getattr(strategy.options, what) is True and strategy.layout.tensor == 1:
            strategy.choices[what] = "not used: tensor_parallel_size is 1"
            rank_zero_warn(f"{what}=True has no effect: tensor_parallel_size is 1")
