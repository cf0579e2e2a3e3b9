"""Data that comes to look unlike the first batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_bharat.health.batch import IGNORED
from lightning_bharat.health.robust import center_and_spread

BLOCK = 20  # batches that are looked at together
REFERENCE = 10  # blocks that say what is usual
BUCKETS = 64
MOST_TOKENS = 4096  # of a batch, evenly spread
FAR = 8.0  # spreads
ROWS = 2  # blocks in a row


class DriftDetector:
    """Compares blocks of 20 batches with the first ten blocks: which tokens they have (in 64 buckets) and what share of
    the labels counts; or, in batches without tokens, the mean and the mean square of the numbers.

    A block's distance from the reference is that of Jensen and Shannon (Lin, 1991). How far a block usually is, the
    reference itself shows, whose blocks are compared with the rest of it; so documents that fill whole batches do not
    look like drift. It is drift where two blocks in a row are eight robust spreads away.

    Found within 40 batches. The sums are made where the batch is; a device is waited for once a block.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._batches = 0
        self._blocks: list[Tensor] = []
        self._usual: list[tuple[float, float]] = []
        self._in_a_row: dict[str, int] = {}

    @torch.no_grad()
    def look(self, batch: Any) -> list[str]:
        """Take in a batch; returns what has drifted, in words, once until it is as before again."""
        sums = _sums(batch)
        if sums is None or (self._sums is not None and sums.shape != self._sums.shape):
            return []
        self._sums = sums if self._sums is None else self._sums + sums
        self._batches += 1
        if self._batches % BLOCK:
            return []
        block, self._sums = self._sums.double().cpu(), None
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
                first = BLOCK * REFERENCE
                found.append(f"the {name} of the last {ROWS * BLOCK} batches are unlike those of the first {first}")
        return found


def _sums(batch: Any) -> Tensor | None:
    """Of tokens: their counts in buckets, those of labels that count and of all. Of numbers: count, sum, squares."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.numel()]
    tokens = [leaf for leaf in leaves if leaf.dtype in (torch.int64, torch.int32) and leaf.ndim > 1]
    if tokens:
        some, labels = _some(tokens[0]), _some(tokens[-1])
        counts = torch.zeros(BUCKETS + 2, dtype=torch.float32, device=some.device)
        ones = torch.ones(len(some), device=some.device)
        counts.scatter_add_(0, some.remainder(BUCKETS).long(), ones)
        counts[BUCKETS] = (labels != IGNORED).sum()
        counts[BUCKETS + 1] = len(labels)
        return counts
    numbers = [leaf for leaf in leaves if leaf.is_floating_point()]
    if not numbers:
        return None
    some = _some(numbers[0]).float()
    return torch.stack([some.new_tensor(len(some)), some.sum(), some.square().sum()])


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // MOST_TOKENS)]


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
