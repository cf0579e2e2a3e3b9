"""Data that comes to look unlike the first batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_bharat.health.batch import IGNORED
from lightning_bharat.health.robust import center_and_spread

EVERY = 4  # batches of which one is looked at
BLOCK = 10  # looks that are taken together
REFERENCE = 10  # blocks that say what is usual
BUCKETS = 64
MOST = 1024  # elements of a batch that are looked at, evenly spread
FAR = 8.0  # spreads
ROWS = 2  # blocks in a row


class DriftDetector:
    """Compares blocks of 40 batches with the first ten blocks: which tokens they have (in 64 buckets) and what share of
    the labels counts; or, in batches without tokens, the mean and the mean square of the numbers.

    A block's distance from the reference is that of Jensen and Shannon (Lin, 1991). How far a block usually is, the
    reference itself shows, whose blocks are compared with the rest of it; so documents that fill whole batches do not
    look like drift. It is drift where two blocks in a row are eight robust spreads away.

    Found within 120 batches. One batch in four is looked at. A device is waited for once a block.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._some: list[tuple[Tensor, Tensor]] = []
        self._blocks: list[Tensor] = []
        self._usual: list[tuple[float, float]] = []
        self._in_a_row: dict[str, int] = {}

    def look(self, batch: Any, leaves: Sequence[Any] | None = None) -> list[str]:
        """Take in a batch; returns what has drifted, in words, once until it is as before again.

        Args:
            leaves: of ``batch``, where they are known.
        """
        self._batches += 1
        if self._batches % EVERY:
            return []
        return self._taken(tree_leaves(batch) if leaves is None else leaves)

    @torch.no_grad()
    def _taken(self, leaves: Sequence[Any]) -> list[str]:
        some = _part(leaves)
        if some is None or (self._some and some[0].dtype != self._some[0][0].dtype):
            return []
        self._some.append(some)
        if len(self._some) < BLOCK:
            return []
        block, self._some = _sums(self._some).double().cpu(), []
        if len(self._blocks) < REFERENCE:
            self._blocks.append(block)
            return []
        if not self._usual:
            self._set_usual()
        return self._compared(block)

    def _set_usual(self) -> None:
        whole = torch.stack(self._blocks).sum(0)
        alone = [_distances(block, whole - block) for block in self._blocks]
        self._usual = [center_and_spread(values) for values in zip(*alone, strict=True)]
        self._blocks = [whole] * REFERENCE

    def _compared(self, block: Tensor) -> list[str]:
        found = []
        names = ("tokens", "share of labels that count") if len(block) > 4 else ("mean", "mean square")
        for name, far, (middle, spread) in zip(names, _distances(block, self._blocks[0]), self._usual, strict=True):
            away = (far - middle) / max(spread, 0.1 * abs(middle), 1e-6)
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if away > FAR else 0
            if self._in_a_row[name] == ROWS:
                last, first = ROWS * BLOCK * EVERY, REFERENCE * BLOCK * EVERY
                found.append(f"the {name} of the last {last} batches are unlike those of the first {first}")
        return found


def _part(leaves: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Some tokens and labels of a batch, or some numbers twice; copies, since a batch may be changed."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]
    tokens = [tensor for tensor in tensors if tensor.dtype in (torch.int64, torch.int32) and tensor.ndim > 1]
    if tokens:
        some = _some(tokens[0])
        return some, some if len(tokens) == 1 else _some(tokens[-1])
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    return (_some(numbers[0]),) * 2 if numbers else None


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // MOST)].clone()


def _sums(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of tokens: their counts in buckets, those of labels that count and of all. Of numbers: count, sum, squares."""
    some, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    if some.is_floating_point():
        return torch.stack([some.new_tensor(len(some)).float(), some.float().sum(), some.float().square().sum()])
    counts = torch.zeros(BUCKETS + 2, device=some.device)
    counts.scatter_add_(0, some.remainder(BUCKETS).long(), torch.ones(len(some), device=some.device))
    counts[BUCKETS], counts[BUCKETS + 1] = (labels != IGNORED).sum(), len(labels)
    return counts


def _distances(block: Tensor, rest: Tensor) -> list[float]:
    if len(block) > 4:
        counting = [float(of[BUCKETS] / of[BUCKETS + 1].clamp(min=1)) for of in (block, rest)]
        return [_jensen_shannon(block[:BUCKETS], rest[:BUCKETS]), abs(counting[0] - counting[1])]
    (mean, square), (mean_of_rest, square_of_rest) = ((of[1:] / of[0].clamp(min=1)).tolist() for of in (block, rest))
    return [abs(mean - mean_of_rest), abs(square - square_of_rest)]


def _jensen_shannon(a: Tensor, b: Tensor) -> float:
    p, q = a / a.sum().clamp(min=1), b / b.sum().clamp(min=1)
    m = (p + q) / 2
    return float((torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(m, m)).sum() / 2)
