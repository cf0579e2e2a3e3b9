"""The tensor cut of a whole model on real ranks: what the plan proved for a block, carried out on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from lightning_bharat.plan.cut_modules import Flow
from lightning_bharat.plan.exchange import Peers, ProcessPeers
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.shards import TensorSlice
from lightning_bharat.plan.slicing import Slicer


def cut_module(
    module: nn.Module,
    plan: ModelPlan,
    group: dist.ProcessGroup | Peers,
    sequence: bool = False,
    loss: bool = False,
    stages: Sequence[range] = (),
    split_backward: bool = False,
) -> dict[str, TensorSlice]:
    """Cut ``module`` in place over the ranks of ``group``.

    Args:
        module: whole, real or on ``meta``; names of parameters stay.
        plan: proven for this number of ranks.
        group: the tensor ranks.
        sequence: divide the hidden state between cuts along the sequence, where ``plan.sequence`` is "".
        loss: keep logits divided along the vocabulary, where ``plan.loss`` is "".
        stages: the blocks of each pipeline stage, between which the hidden state is whole.
        split_backward: whether a schedule computes gradients of weights apart from those of hidden states.

    Returns:
        By full name, which part of the whole parameter this rank holds; parameters that are not named are whole.
    """
    peers: Peers = ProcessPeers(group) if isinstance(group, dist.ProcessGroup) else group
    slicer = Slicer(peers)
    flow = Flow(peers, sequence and not plan.sequence, plan.random, split_backward)
    names = plan.block_names(module)
    stages = stages or [range(len(names))]
    firsts, lasts = {stage.start for stage in stages}, {stage.stop - 1 for stage in stages}
    for i, (name, kind) in enumerate(zip(names, plan.kinds, strict=True)):
        slicer.block(
            module.get_submodule(name),
            name,
            plan.cuts[kind],
            plan.summed.get(kind, ()),
            flow,
            plan.hidden,
            (i in firsts, i in lasts),
        )
    for cut in plan.outside:
        slicer.outside(module, cut, loss and not plan.loss)
    return slicer.slices
