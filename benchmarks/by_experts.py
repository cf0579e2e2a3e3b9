"""A loop over a decoder with experts, written by hand: the dispatch of the strategy, FSDP2 around the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grads_with_norm_

from benchmarks.contestants import CLIP, HandWritten, norm
from lightning_bharat.models import GPT
from lightning_bharat.models.moe import Router
from lightning_bharat.plan.experts import ProcessRoutes, cut_experts, find_experts


class ByExperts(HandWritten):
    """As :class:`HandWritten`, on data ranks over which experts are spread, none of which is on two of them."""

    def _cut(self, model: GPT) -> Callable[[], None]:
        routes = ProcessRoutes(self.strategy.expert_group)
        experts: list[nn.Parameter] = []
        for found in find_experts(model):
            part = model.get_submodule(found.name)
            cut_experts(part, found, routes)
            experts += part.parameters()
        mesh = self.strategy.device_mesh["data_parallel"]
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, ignored_params=set(experts))
        rest = [p for p in model.parameters() if all(p is not expert for expert in experts)]
        return lambda: _clip(experts, rest, routes.group)

    def _after_step(self, model: GPT) -> None:
        """The module watches how tokens are spread, over all ranks."""
        seen = [part.take() for part in model.modules() if isinstance(part, Router)]
        dist.all_reduce(torch.stack([each for each in seen if each is not None]))


@torch.no_grad()
def _clip(experts: list[nn.Parameter], rest: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """torch's own clipping does not know that each rank has other experts."""
    pieces = norm(experts).square()
    dist.all_reduce(pieces, group=group)
    total = (pieces + norm(rest).square()).sqrt()
    for parameters in (experts, rest):
        clip_grads_with_norm_(parameters, CLIP, total)
