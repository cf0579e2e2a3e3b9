"""A block on parts of a sequence against the same block on the whole, on the ranks and the batch that train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_bharat.plan.cut_modules import SEQUENCE_DIM
from lightning_bharat.plan.exchange import Peers
from lightning_bharat.plan.prove import NoDropout

# Of what a block adds to the hidden state: rounding is far below, and what a wrong mask or position does far above.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
COARSE = 5e-2


@torch.no_grad()
def difference(
    parts: Callable[[], Any], whole: Callable[[Tensor], Any], hidden: Tensor, peers: Peers
) -> tuple[float, bool]:
    """Compare what a block returns on parts and on the whole, without dropout.

    Args:
        parts: calls the block on this rank's part.
        whole: calls it on the whole hidden state.
        hidden: this rank's part of that, (batch, part of the time, channels).
        peers: the context ranks, all of which must call it.

    Returns:
        The largest difference on any of the peers, relative to what the block adds to the hidden state, and whether
        it is too large on any of them.
    """
    with torch.random.fork_rng(devices=[]), NoDropout():
        found = _hidden(parts())
        expected = _hidden(whole(peers.all_gather(hidden, SEQUENCE_DIM)))
    expected = expected.chunk(peers.size, SEQUENCE_DIM)[peers.rank]
    added = _largest((expected - hidden).double()) if expected.shape == hidden.shape else _largest(expected.double())
    rounding = 16 * torch.finfo(expected.dtype).eps * _largest(expected.double())
    away = _largest((found - expected).double()) if found.shape == expected.shape else torch.full_like(added, torch.inf)
    coarse = torch.is_autocast_enabled(expected.device.type)
    tolerance = COARSE if coarse else TOLERANCES.get(expected.dtype, COARSE)
    wrong = ~(away <= tolerance * added + rounding)
    relative = (away / added.clamp_min(1e-30)).nan_to_num(nan=torch.inf)
    largest, any_wrong = peers.all_max(torch.stack([relative, wrong.double()])).tolist()
    return largest, bool(any_wrong)


def _hidden(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()
