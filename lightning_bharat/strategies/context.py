"""The context cut of a strategy's module: found and proven on rank 0, carried out on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_bharat.plan.blocks import UNCUT, PlanError
from lightning_bharat.plan.cut_context import ContextCut, ContextFlow, cut_context
from lightning_bharat.plan.exchange import ProcessPeers
from lightning_bharat.plan.find_context import find_context_cut
from lightning_bharat.plan.whole_attention import ContextError
from lightning_bharat.strategies._torch import in_backward, is_compiled
from lightning_bharat.strategies.rank_zero import found_by_rank_zero

if TYPE_CHECKING:
    from lightning_bharat.plan.observe import Step
    from lightning_bharat.strategies.hybrid import HybridStrategy


def find_for(strategy: HybridStrategy, trainer: pl.Trainer, module: pl.LightningModule) -> ContextCut:
    """Where the sequence of ``module``, still whole, is cut. All ranks must call it.

    Raises:
        ContextError: on all ranks with the same words.
    """
    for name, part in module.named_modules():
        if is_compiled(part):
            raise ContextError(
                f"{name or 'the module'} ({type(part).__name__}) is compiled, so what it exchanges with context ranks "
                "could not be put into it; leave its compile() out, or write context_parallel_size=1"
            )
    instead = "context_parallel_size=1"

    def find(step: Step, batch: Any) -> dict[str, Any]:
        try:
            return find_context_cut(module, step, batch, strategy.layout.context).to_dict()
        except PlanError as error:
            raise ContextError(str(error).replace(UNCUT, f"write {instead}")) from error

    found = found_by_rank_zero(strategy, trainer, find, ContextError, "the context cut", instead)
    return ContextCut.from_dict(found)


def carry_out(
    strategy: HybridStrategy,
    module: pl.LightningModule,
    cut: ContextCut,
    stages: Sequence[range] = (),
    split_backward: bool = False,
) -> ContextFlow:
    """Divide the sequence in the blocks of ``module``; says how in the strategy's choices."""
    assert strategy.context_group is not None
    flow = cut_context(module, cut, ProcessPeers(strategy.context_group), stages, split_backward)
    flow.in_backward = in_backward
    ranks = strategy.layout.context
    strategy.choices["context_parallel_size"] = (
        f"{ranks}: the sequence is cut at the first of {len(cut.kinds)} blocks and gathered after the last; "
        f"{_attention(cut, ranks, strategy.layout.tensor)}; proven in float64"
    )
    return flow


def _attention(cut: ContextCut, ranks: int, tensor: int) -> str:
    if not cut.heads:
        return "blocks have no attention"
    heads, of_keys = (max(n // tensor, 1) for n in cut.heads)
    if heads % ranks:
        return f"attention gathers keys and values, since its {heads} heads do not divide"
    repeated = "" if of_keys % ranks == 0 else f", key-value heads ({of_keys}) repeated"
    return f"attention exchanges parts of the time for heads ({heads}{repeated}; Ulysses)"
