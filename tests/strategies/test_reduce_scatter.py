"""Parts of gradients, exchanged and added, are what gloo's own reduce-scatter makes of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_bharat.strategies.reduce_scatter import ExchangeAndAdd
from tests.ranks import RanksFailed, run_ranks

TYPES = (torch.float64, torch.float32, torch.bfloat16)
OPERATIONS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.AVG}


def scattered(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dist.init_process_group("gloo")
    ranks, group = dist.get_world_size(), dist.group.WORLD
    draw, found = torch.Generator().manual_seed(dist.get_rank()), []
    for kind in TYPES:
        for operation in OPERATIONS.values():
            given = torch.randn(size * ranks, generator=draw, dtype=torch.float64).to(kind)
            ours, gloos = torch.full((2, size), torch.nan, dtype=kind)
            before = given.clone()
            ExchangeAndAdd()(ours, given, group, operation)
            assert given.equal(before)
            dist.reduce_scatter_single(gloos, given.clone(), op=operation)
            found.append((ours, gloos))
    return found


@pytest.mark.parametrize(("ranks", "size"), [(2, 1000), (3, 7), (3, 0)])
def test_as_gloos_own(ranks: int, size: int) -> None:
    for of_rank in run_ranks(scattered, ranks, size):
        for ours, gloos in of_rank:
            torch.testing.assert_close(ours, gloos, rtol=2 * torch.finfo(ours.dtype).eps, atol=0.02)
            if ours.dtype == torch.float64:
                torch.testing.assert_close(ours, gloos, rtol=0, atol=1e-14)


def others() -> None:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    ExchangeAndAdd()(torch.zeros(1), torch.zeros(2), dist.group.WORLD, dist.ReduceOp.MAX)


def test_other_operations_are_refused() -> None:
    with pytest.raises(RanksFailed, match="a reduce-scatter with op="):
        run_ranks(others, 2)
