"""Gradients that copies on other hosts average in eight bits, for slow links between them.

As in ZeRO++ (Wang et al., 2023, https://arxiv.org/abs/2306.10209) numbers travel as int8 with a scale for each block of
them, first to the rank that adds a part up and then from it to all; and what rounding took away is added to the next
step's gradient, as in 1-bit SGD (Seide et al., 2014; error feedback, Karimireddy et al., 2019,
https://arxiv.org/abs/1901.09847), so that nothing is lost for good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # numbers with one scale: 1.6 % more to send, in float32


@dataclass
class Quantized:
    """Numbers as ``steps`` (..., :data:`BLOCK`), int8, times ``scale`` (..., 1)."""

    steps: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Quantized:
        """Of (..., :data:`BLOCK`). A block with a number that is not finite has no finite number afterwards."""
        scale = x.abs().amax(-1, keepdim=True) / 127
        steps = (x / scale).nan_to_num_(0, 127, -127).round_().to(torch.int8)
        return cls(steps, torch.where(scale.isfinite(), scale, torch.nan))

    def numbers(self) -> Tensor:
        return self.steps.to(self.scale.dtype) * self.scale


@dataclass(eq=False)
class CompressedGroup:
    """Stands in for the process group over which FSDP2 adds up one unit's gradients, which all have one size.

    Attributes:
        group: the ranks with copies.
        sent: bytes that this rank has sent to each other rank.
    """

    group: dist.ProcessGroup
    sent: int = 0
    _owed: dict[str, Tensor] = field(default_factory=dict)  # what rounding took away, to be sent with the next

    def size(self) -> int:
        return self.group.size()

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        """Sum or mean in place, bit for bit the same on all ranks."""
        (tensor,) = tensors
        ranks = self.size()
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        x = F.pad(exact, (0, -len(exact) % (ranks * BLOCK)))
        mine = self._rounded("mine", x.view(ranks, -1, BLOCK))
        total = self._swapped(mine).numbers().sum(0)
        if options.reduceOp == dist.ReduceOp.AVG:
            total /= ranks
        everyone = self._gathered(self._rounded("total", total))
        tensor.copy_(everyone.numbers().flatten()[: tensor.numel()])

    def _rounded(self, name: str, x: Tensor) -> Quantized:
        if name in self._owed:
            x = x + self._owed[name]
        rounded = Quantized.of(x)
        self._owed[name] = (x - rounded.numbers()).nan_to_num_(0, 0, 0)
        return rounded

    def _swapped(self, mine: Quantized) -> Quantized:
        """Of parts for each rank, this rank's of all ranks."""
        theirs = Quantized(torch.empty_like(mine.steps), torch.empty_like(mine.scale))
        for received, sent in ((theirs.steps, mine.steps), (theirs.scale, mine.scale)):
            dist.all_to_all_single(received, sent, group=self.group)
            self.sent += sent[0].nbytes
        return theirs

    def _gathered(self, part: Quantized) -> Quantized:
        every = [x.new_empty(self.size(), *x.shape) for x in (part.steps, part.scale)]
        for received, sent in zip(every, (part.steps, part.scale), strict=True):
            dist.all_gather(list(received), sent, group=self.group)
            self.sent += sent.nbytes
        return Quantized(*every)
