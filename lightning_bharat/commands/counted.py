"""What a rank of a module holds and does: cut on ``meta`` as the strategy cuts it, and counted in dry runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_bharat.plan.copies import copy_module
from lightning_bharat.plan.count_work import count_work
from lightning_bharat.plan.cut_context import ContextCut, cut_context
from lightning_bharat.plan.experts import cut_experts, find_experts
from lightning_bharat.plan.memory import State
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.moved import Counters, CountingPeers, CountingRoutes
from lightning_bharat.plan.observe import Step
from lightning_bharat.plan.share import Share
from lightning_bharat.plan.work import Growth
from lightning_bharat.strategies.tensor import cut_module

COUNTED = 2  # expert ranks: with more of them each has as many tokens


@dataclass(frozen=True)
class Cuts:
    """How a module is cut before its work is counted.

    Attributes:
        plan: proven for ``tensor`` ranks.
        tensor: ranks.
        context: ranks.
        sequence: proven for ``context`` ranks, if there are several.
        experts: whether experts can be spread, as proven.
    """

    plan: ModelPlan
    tensor: int = 1
    context: int = 1
    sequence: ContextCut | None = None
    experts: bool = False


def counted(
    module: nn.Module,
    cuts: Cuts,
    step: Step,
    batch: Any,
    time: int | None,
    state_of: Callable[[nn.Module], State],
    like: Share | None = None,
) -> Share:
    """What a rank holds and does.

    Args:
        module: whole, on ``meta`` or not; it is not changed.
        cuts: of it.
        step: as for :func:`~lightning_bharat.plan.find.find_plan`.
        batch: as the loader gives it.
        time: tokens of a row; ``None``: as in ``batch``.
        state_of: what the optimizers of a module that is cut keep.
        like: the share of as many tensor ranks, of which context ranks hold the same; ``None``: there is none yet.

    Raises:
        PlanError: the step can't be counted with such a batch.
    """

    def growth(spread: bool) -> Growth:
        copy, counters = _cut(module, cuts, spread)
        return count_work(copy, cuts.plan.block_names(copy), step, batch, time, counters)

    whole, spread = growth(False), growth(True) if cuts.experts else None
    if like is not None:
        return replace(like, growth=whole, spread=spread)
    held = copy_module(module)
    if cuts.tensor > 1:
        cut_module(held, cuts.plan, CountingPeers(cuts.tensor))
    return Share(held, cuts.plan, state_of(held), whole, spread)


def _cut(module: nn.Module, cuts: Cuts, spread: bool) -> tuple[nn.Module, Counters]:
    """As the strategy does by itself, but with the first of all ranks, which count."""
    counters = Counters(
        CountingPeers(cuts.tensor), CountingPeers(cuts.context), CountingRoutes(COUNTED if spread else 1)
    )
    copy = copy_module(module)
    if cuts.tensor > 1:  # nobody draws random numbers here
        divided = cuts.context == 1 and not spread
        cut_module(copy, replace(cuts.plan, random=False), counters.tensor, sequence=divided, loss=True)
    if cuts.sequence is not None and cuts.context > 1:
        cut_context(copy, replace(cuts.sequence, random=False), counters.context, compared=False)
    for each in find_experts(copy) if spread else ():
        cut_experts(copy.get_submodule(each.name), each, counters.expert)
    return copy, counters
