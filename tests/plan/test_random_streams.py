"""Dropout under a tensor cut: the same masks where ranks compute alike, others where they divide; recomputed too."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_bharat.plan.exchange import ProcessPeers
from lightning_bharat.plan.find import find_plan
from lightning_bharat.strategies.tensor import cut_module
from tests.plan.models import FusedBlock, Nano, batch_of, step
from tests.ranks import run_ranks


class Dropping(FusedBlock):
    """Drops in attention, between the linears and on what both return; keeps the masks."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), 0.1, self.training)
        inner = F.dropout(F.gelu(self.up(self.norm2(x))), 0.5, self.training)
        out = F.dropout(self.down(inner), 0.5, self.training)
        self.inside, self.outside = inner.detach() == 0, out.detach() == 0
        return x + out


class Recomputing(Dropping):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def masks(block: type[nn.Module], sequence: bool) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    module = Nano(block)
    batches = [batch_of(module, seed) for seed in range(4)]
    slices = cut_module(module, find_plan(module, step, batches[0], 2), dist.group.WORLD, sequence, True)
    peers = ProcessPeers(dist.group.WORLD)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in batches:
        step(module, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = module.layers[-1]
    inside = peers.all_gather(layer.inside[None], 0)
    outside = peers.all_gather(layer.outside[None], 0)
    assert 0.4 < inside.float().mean() < 0.6
    assert 0.4 < (inside[0] != inside[1]).float().mean() < 0.6  # independent
    assert sequence != torch.equal(outside[0], outside[1])  # ranks hold other tokens when the sequence is divided
    for name, parameter in module.named_parameters():
        if name not in slices:
            copies = peers.all_gather(parameter.detach()[None], 0)
            assert torch.equal(copies[0], copies[1]), name
    state = peers.all_gather(torch.get_rng_state()[None], 0)
    assert torch.equal(state[0], state[1])


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize("block", [Dropping, Recomputing])
def test_masks_differ_just_where_ranks_divide(block, sequence) -> None:
    run_ranks(masks, 2, block, sequence)
