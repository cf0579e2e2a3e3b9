"""Experts spread over data and context ranks: proven on rank 0, cut on all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.experts import FusedExperts, ProcessRoutes, check_experts, cut_experts
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.prove_experts import prove_experts
from lightning_bharat.plan.shards import TensorSlice

if TYPE_CHECKING:
    from lightning_bharat.strategies.hybrid import HybridStrategy


def spread_experts(
    strategy: HybridStrategy, module: nn.Module, plan: ModelPlan
) -> tuple[list[str], dict[str, TensorSlice]]:
    """Let each expert rank keep its experts of ``module``. All ranks must call it.

    Returns:
        The names of the modules that hold them, and by full name which part of a parameter this rank has.

    Raises:
        PlanError: on all ranks with the same words.
    """
    ranks = strategy.layout.expert
    if strategy.options.activation_checkpointing == "selective":
        raise PlanError(
            f'activation_checkpointing="selective" with expert_parallel_size={ranks}: torch can not choose what to '
            'keep of a block in which experts are gathered apart; write "full" or leave it out'
        )
    found = check_experts(module, ranks)
    _refuse_summed(plan, found)
    problem = ""
    if strategy.is_global_zero:
        try:
            with isolate_rng():
                prove_experts(module, found, ranks)
        except PlanError as error:
            problem = str(error)
    problem = strategy.broadcast(problem)
    if problem:
        raise PlanError(problem)
    routes = ProcessRoutes(strategy.expert_group)
    slices: dict[str, TensorSlice] = {}
    for each in found:
        part = module.get_submodule(each.name)
        cut = cut_experts(part, each, routes, ranks / strategy.layout.context)
        slices |= {f"{each.name}.{leaf}": cut for leaf, _ in part.named_parameters(recurse=False)}
    counts = sorted({each.experts for each in found})
    strategy.choices["expert_parallel_size"] = (
        f"{ranks}: {len(found)} modules keep 1/{ranks} of their {' or '.join(map(str, counts))} experts on each rank; "
        "proven that nothing changes"
    )
    return [each.name for each in found], slices


def _refuse_summed(plan: ModelPlan, found: list[FusedExperts]) -> None:
    """Tensor ranks would sum gradients of weights that lie on other ranks."""
    for names in plan.summed.values():
        for each in found:
            if any(each.name.endswith(f".{name.rpartition('.')[0]}") for name in names):
                raise PlanError(
                    f"{each.name}: its gradient is partial on each tensor rank, and its experts are to be spread as "
                    "well; write tensor_parallel_size=1 or expert_parallel_size=1"
                )
