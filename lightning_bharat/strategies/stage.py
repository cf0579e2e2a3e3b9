"""A stage of a pipeline: the person's own step runs on it, in the person's own module, with its blocks and no others.

Blocks are placeholders while a stage runs: the one before its first block returns what has arrived, the one after its
last block raises :class:`StageDone` with what leaves, all others pass on what they get; its own run the block. No hook
stands on a block of its own, since a hook would run again when a person's code recomputes that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.elsewhere import elsewhere, is_elsewhere
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.partition import block_of, placed
from lightning_bharat.strategies._torch import is_view
from lightning_bharat.strategies.token_weights import uncounted


class StageDone(BaseException):
    """Ends a step where the next stage goes on. Not an ``Exception``: a person's code must not catch it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Placeholder(nn.Module):
    """Stands for ``block``, whose attributes it shows. Its parameters too: a step may go through those of the model."""

    def __init__(self, block: nn.Module, plan: ModelPlan) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _plan=plan)
        self.__dict__.update(_parameters=block._parameters, _buffers=block._buffers, _modules=block._modules)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def _hidden(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        where = self._plan.hidden
        return args[where] if isinstance(where, int) else kwargs[where]

    def _returned(self, hidden: Any) -> Any:
        return (hidden, *[None] * (self._plan.outputs - 1)) if self._plan.outputs else hidden


class _PassOn(_Placeholder):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._returned(self._hidden(args, kwargs))


class _Arrive(_Placeholder):
    def __init__(self, block: nn.Module, plan: ModelPlan, stage: Stage) -> None:
        super().__init__(block, plan)
        self.__dict__["_stage"] = stage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._returned(self._stage.arrived)


class _Leave(_Placeholder):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StageDone(self._hidden(args, kwargs))


class _Own(_Placeholder):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with uncounted():
            return self.__dict__["_block"](*args, **kwargs)


@dataclass
class _Tree:
    """The person's module, kept where it is no child of a stage."""

    module: nn.Module
    plan: ModelPlan
    container: nn.Module
    placeholders: dict[str, nn.Module]


class Stage(nn.Module):
    """The part of a module from one block to another, as ``torch.distributed.pipelining`` wants it.

    Args:
        module: the whole tree; each stage of a rank is of the same one.
        plan: where its blocks are.
        index, blocks: which stage it is, and its blocks.
    """

    def __init__(self, module: nn.Module, plan: ModelPlan, index: int, blocks: range) -> None:
        super().__init__()
        self.index, self.blocks = index, blocks
        self.arrived: Tensor | None = None
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == plan.depth
        self.run: Callable[[Any], Any] | None = None
        container = module.get_submodule(plan.blocks)
        keys = [name.rpartition(".")[2] for name in plan.block_names(module)]
        placeholders = {key: self._placeholder(i, container.get_submodule(key), plan) for i, key in enumerate(keys)}
        self._tree = _Tree(module, plan, container, placeholders)

    def _placeholder(self, i: int, block: nn.Module, plan: ModelPlan) -> nn.Module:
        if i in self.blocks:
            return _Own(block, plan)
        if i == self.blocks.start - 1:
            return _Arrive(block, plan, self)
        return _Leave(block, plan) if i == self.blocks.stop else _PassOn(block, plan)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of its blocks and, of what is outside of blocks, those that this rank holds; as they are now, gathered
        or not."""
        plan, module = self._tree.plan, self._tree.module
        mine = {plan.block_names(module)[i] for i in self.blocks}
        for name, parameter in module.named_parameters():
            block = block_of(name, plan)
            if not is_elsewhere(parameter) and (not block or block in mine):
                yield parameter

    def forward(self, *arrived: Tensor, mb: Any) -> Any:
        """``run(mb)``: the loss on the last stage, elsewhere the hidden state that leaves."""
        assert self.run is not None
        self.arrived = arrived[0] if arrived else None
        with self._mounted():
            try:
                out = self.run(mb)
            except StageDone as done:
                self._refuse_other_type(done.hidden)
                return _sent(done.hidden)
            finally:
                self.arrived = None
        if not self.is_last:
            raise PlanError(
                f"the step ended before block {self.blocks.stop}, on which the next pipeline stage begins; "
                "a step must run all blocks on every batch"
            )
        return out

    def _refuse_other_type(self, hidden: Tensor) -> None:
        """The next stage waits for as many bytes as the plan says."""
        found, said = str(hidden.dtype).removeprefix("torch."), self._tree.plan.wire
        if found != said:
            raise PlanError(
                f"block {self.blocks.stop - 1} returns {found}, and plan= says {said}: it was found in another "
                "precision. Find it in this one, or leave plan= out"
            )

    @contextmanager
    def _mounted(self) -> Iterator[None]:
        blocks = self._tree.container._modules
        own = {key: blocks[key] for key in self._tree.placeholders}
        blocks.update(self._tree.placeholders)
        try:
            yield
        finally:
            blocks.update(own)


@contextmanager
def before_blocks(module: nn.Module, plan: ModelPlan) -> Iterator[None]:
    """In here a step ends (by :class:`StageDone`) where the first block begins."""
    blocks = module.get_submodule(plan.blocks)._modules
    own = dict(blocks)
    blocks.update({key: _Leave(block, plan) for key, block in own.items() if block is not None})
    try:
        yield
    finally:
        blocks.update(own)


def keep_own(
    module: nn.Module, plan: ModelPlan, stages: list[range], mine: list[int], device: torch.device
) -> dict[str, set[int]]:
    """Give up the parameters that only other stages need.

    Args:
        module: whole or cut over tensor ranks, before it is divided over data ranks.
        stages: the blocks of each.
        mine: which of them are this rank's.
        device: of the one element that stays of each.

    Returns:
        By name (the first of tied ones), the stages that hold each parameter outside of blocks.
    """
    found = placed(module, plan, stages)
    firsts: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        firsts.setdefault(id(parameter), name)
    stands: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, held in list(owner._parameters.items()):
            if held is None or is_elsewhere(held):
                continue
            first = firsts[id(held)]
            if not found[first] & set(mine):
                if id(held) not in stands:
                    stands[id(held)] = elsewhere(held, device)
                owner._parameters[leaf] = stands[id(held)]
    return found


def _sent(hidden: Tensor) -> Tensor:
    """Fit for torch's schedules: a stage of frozen weights too gets a gradient for what it sent; they detach it in
    place, which no view allows."""
    if not torch.is_grad_enabled():
        return hidden
    if not hidden.requires_grad:
        return hidden.detach().requires_grad_()
    return hidden.clone() if is_view(hidden) else hidden
