"""What a tensor rank of a project's module holds and does, for each number of tensor ranks that is proven."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from lightning_bharat.plan.copies import copy_module
from lightning_bharat.plan.estimate import Share
from lightning_bharat.plan.find import find_plan, structural_plan
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.memory import State, optimizer_state
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.work import CountingPeers, count_work
from lightning_bharat.strategies.dry_step import dry_step, first_batch
from lightning_bharat.strategies.tensor import cut_module


def share_of(
    trainer: pl.Trainer, module: pl.LightningModule, plan: ModelPlan, tensor: int, time: int | None
) -> tuple[Share, str]:
    """What one of ``tensor`` tensor ranks holds and does, cut as the strategy does by itself; and a remark, or "".

    Args:
        time: tokens of a row; ``None``: as in the project's data.

    Raises:
        PlanError: the step can't be counted with such a batch.
    """
    share, peers, step = copy_module(module), CountingPeers(tensor), dry_step(trainer)
    share.trainer = trainer
    if tensor > 1:  # nobody draws random numbers here
        cut_module(share, replace(plan, random=False), peers, sequence=True, loss=True)

    def in_precision(copy: pl.LightningModule, batch: Any) -> Any:
        with trainer.precision_plugin.forward_context():
            return step(copy, batch)

    growth = count_work(share, plan.block_names(share), in_precision, first_batch(trainer), time, peers)
    state, note = state_of(share)
    return Share(share, plan, state, growth), note


def proven_plans(
    trainer: pl.Trainer, module: pl.LightningModule, sizes: Iterable[int]
) -> tuple[dict[int, ModelPlan], list[str]]:
    """By number of tensor ranks, the plan proven for it; and in words, which numbers are refused and why."""
    step, batch = dry_step(trainer), first_batch(trainer)
    refused: list[str] = []
    try:
        plans = {1: find_plan(module, step, batch, 1)}
    except ValueError as error:
        plans = {1: replace(structural_plan(module), apart=str(error))}
    for tensor in sorted(set(sizes) - {1}):
        try:
            plan = find_plan(module, step, batch, tensor)
            Layout(tensor=tensor).check(plan)
            plans[tensor] = plan
        except ValueError as error:  # LayoutError, PlanError: all others of that size would be refused alike
            refused.append(f"No layout with tensor={tensor}: {error}.")
    return plans, refused


def state_of(module: pl.LightningModule) -> tuple[State, str]:
    """What the module's optimizers keep; AdamW's states, with a note that says so, where that can't be known."""
    try:
        made = tree_leaves(module.configure_optimizers())
        return optimizer_state(o for o in made if isinstance(o, Optimizer)), ""
    except Exception as error:  # whatever a person's configure_optimizers or an optimizer raises on meta
        trained = [p for p in module.parameters() if p.requires_grad]
        note = f"The optimizer is taken for AdamW, since the module's could not be stepped on meta: {error}."
        return optimizer_state([AdamW(trained)] if trained else []), note
