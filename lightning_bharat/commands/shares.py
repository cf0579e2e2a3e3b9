"""What a rank of a project's module holds and does, for each number of ranks that is proven for a cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_bharat.commands.counted import Cuts, counted
from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.count_work import resized
from lightning_bharat.plan.cut_context import ContextCut
from lightning_bharat.plan.experts import check_experts, find_experts
from lightning_bharat.plan.find import find_plan, structural_plan
from lightning_bharat.plan.find_context import find_context_cut
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.memory import State, optimizer_state
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.observe import Step
from lightning_bharat.plan.prove_experts import MOST_RANKS, prove_experts
from lightning_bharat.plan.share import Share
from lightning_bharat.strategies.dry_step import dry_step, first_batch


def share_of(
    trainer: pl.Trainer, module: pl.LightningModule, cuts: Cuts, time: int | None, like: Share | None = None
) -> tuple[Share, list[str]]:
    """What a rank holds and does, cut as the strategy does by itself; and remarks.

    Args:
        time: tokens of a row; ``None``: as in the project's data.
        like: the share of as many tensor ranks, if there is one.

    Raises:
        PlanError: the step can't be counted with such a batch.
    """
    notes: list[str] = []

    def state(share: Any) -> State:
        share.trainer = trainer
        found, note = state_of(share)
        notes.extend([note] if note else [])
        return found

    return counted(module, cuts, _in_precision(trainer), first_batch(trainer), time, state, like), notes


def _in_precision(trainer: pl.Trainer) -> Step:
    """A dry step as the run's: in other types other operations run."""
    step = dry_step(trainer)

    def in_precision(copy: pl.LightningModule, batch: Any) -> Any:
        with trainer.precision_plugin.forward_context():
            return step(copy, batch)

    return in_precision


def proven_sequences(
    trainer: pl.Trainer, module: pl.LightningModule, sizes: Iterable[int], time: int | None
) -> tuple[dict[int, ContextCut], list[str]]:
    """By number of context ranks, the cut of the sequence proven for it; and in words, which are refused and why.

    Args:
        time: tokens of a row; ``None``: as in the project's data.
    """
    step = _in_precision(trainer)
    batch = tree_map_only(Tensor, lambda x: torch.zeros_like(x, device="cpu"), resized(first_batch(trainer), 2, time))
    found: dict[int, ContextCut] = {}
    refused: dict[str, str] = {}
    for ranks in sorted(set(sizes) - {1}):
        try:
            found[ranks] = find_context_cut(module, step, batch, ranks)
        except ValueError as error:
            alike = str(error).replace(f"context_parallel_size={ranks}", "")  # most that can't be cut can't be at all
            refused.setdefault(alike, f"No layout with context={ranks}: {error}.")
    return found, list(refused.values())


def spreads(module: pl.LightningModule, sizes: Iterable[int]) -> tuple[bool, list[str]]:
    """Whether the experts of ``module``, if it has any, are proven to compute the same when they are spread over ranks;
    and if not, why."""
    found, asked = find_experts(module), set(sizes)
    ranks = sorted(n for n in asked if n > 1 and all(each.experts % n == 0 for each in found))
    if not found or not ranks:
        return False, []
    try:
        check_experts(module, ranks[0])
        for number in {min(n, MOST_RANKS) for n in ranks}:
            prove_experts(module, found, number)
    except PlanError as error:
        return False, [f"No layout with expert ranks: {error}."]
    return True, []


def proven_plans(
    trainer: pl.Trainer, module: pl.LightningModule, sizes: Iterable[int]
) -> tuple[dict[int, ModelPlan], list[str]]:
    """By number of tensor ranks, the plan proven for it; and in words, which numbers are refused and why."""
    step, batch = _in_precision(trainer), first_batch(trainer)
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
