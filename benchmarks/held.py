"""What ranks hold in real steps, counted from their storages, and what the planner says of the same steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import finalize

import lightning as L
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_bharat import Layout, ModelPlan
from lightning_bharat.commands.counted import Cuts, counted
from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.models.moe import MixtureOfExperts, Router
from lightning_bharat.plan.cluster import Cluster, Link
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.estimate import Estimate
from lightning_bharat.plan.find_context import find_context_cut
from lightning_bharat.plan.memory import Memory, optimizer_state
from lightning_bharat.plan.schedules import NONE, SCHEDULES
from lightning_bharat.plan.share import Setting


@dataclass(frozen=True)
class Held(Memory):
    """Bytes on a rank.

    Attributes:
        activations: kept for backward passes, at the fullest moment of a step.
    """

    activations: int


class Count(L.Callback):
    """Counts what this rank holds.

    Attributes:
        held: after the last step.
    """

    def __init__(self) -> None:
        self.held = Held(0, 0, 0, 0, 0)
        self._gathered = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.saved = Saved(module)
        self._divided = {name for name, p in module.named_parameters() if isinstance(p, DTensor)}
        if self._divided:
            for block in module.model.layers:  # in the middle of a block, on the way there and on the way back
                middle = block.mlp.experts if isinstance(block.mlp, MixtureOfExperts) else block.mlp
                middle.register_forward_pre_hook(lambda *_: self._look(module))
                middle.register_full_backward_pre_hook(lambda *_: self._look(module))

    def _look(self, module: L.LightningModule) -> None:
        divided = (p for name, p in module.named_parameters() if name in self._divided)
        whole = storage_bytes(p for p in divided if not isinstance(p, DTensor) and not is_elsewhere(p))
        self._gathered = max(self._gathered, whole)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        parameters = [p for p in module.parameters() if not is_elsewhere(p)]
        states = [leaf for optimizer in trainer.optimizers for leaf in tree_leaves(list(optimizer.state.values()))]
        self.held = Held(
            parameters=storage_bytes(parameters),
            gradients=storage_bytes(p.grad for p in parameters if p.grad is not None),
            optimizer=storage_bytes(leaf for leaf in states if isinstance(leaf, Tensor)),
            gathered=self._gathered,
            activations=self.saved.most,
        )


class _Kept:
    """What stands for a tensor in the graph: it goes when the graph goes. It must not hold the graph itself, as an
    output that a function saves would: then neither ever goes, as long as no backward pass frees it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class Saved:
    """Follows what autograd keeps in ``module.training_step``, which is called with this from now on.

    Attributes:
        most: bytes at the fullest moment so far; weights are not counted.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module, self.most, self._now = module, 0, 0
        self._uses: Counter[int] = Counter()
        step = module.training_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
                return step(*args, **kwargs)

        object.__setattr__(module, "training_step", watched)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        name, size = storage.data_ptr(), storage.nbytes()
        whole = (p for p in self.module.parameters() if not isinstance(p, DTensor))
        if all(p.untyped_storage().data_ptr() != name for p in whole):
            self._now += size * (not self._uses[name])
            self._uses[name] += 1
            self.most = max(self.most, self._now)
            finalize(kept, self._gone, name, size)
        return kept

    def _gone(self, name: int, size: int) -> None:
        self._uses[name] -= 1
        self._now -= size * (not self._uses[name])


class Even(GPTModule):
    """Its tokens choose experts in turn, so that each has as many."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for router in self._routers():
            object.__setattr__(router, "choose", partial(_in_turn, router))


def _in_turn(router: Router, scores: Tensor) -> Tensor:
    return (torch.arange(len(scores) * router.top_k) % router.num_experts).view(len(scores), router.top_k)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's memory behind ``tensors``, shared and padded memory included, each once."""
    here = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in here}.values())


def planned(
    config: GPTConfig, layout: Layout, plan: ModelPlan, microbatches: int, time: int, schedule: str = "1F1B"
) -> list[Held]:
    """What the planner says that each rank of the pipeline holds, from shapes on ``meta``; micro-batches of one row."""
    batch = {name: torch.zeros(2, time, dtype=torch.long) for name in ("input_ids", "labels")}
    with torch.device("meta"):
        module = GPTModule(config)

    def step(copy: Any, batch: Any) -> Tensor:
        return copy._loss(batch)

    sequence = find_context_cut(module, step, batch, layout.context) if layout.context > 1 else None
    cuts = Cuts(plan, layout.tensor, layout.context, sequence, layout.expert > 1)
    share = counted(module, cuts, step, batch, None, lambda cut: optimizer_state([cut.configure_optimizers()]))
    here = Cluster(1, layout.devices, 2**30, 1e9, Link(1e9, 1e-4))
    estimate = Estimate(share, here)
    of_pipeline = next(known for known in SCHEDULES if known.name == schedule)
    setting = Setting(layout, microbatches, 1, of_pipeline if layout.pipeline > 1 else NONE)
    ranks = range(layout.pipeline)
    activations = [int(estimate.on_rank(setting, rank).activations) for rank in ranks]
    return [Held(**vars(estimate.static(setting, rank)), activations=activations[rank]) for rank in ranks]
