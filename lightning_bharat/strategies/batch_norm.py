"""Batch normalization over the rows of all data ranks, so that a model computes what it computes on one.

torch's ``SyncBatchNorm`` needs a GPU and another module in the place of the person's; here only the ``forward`` of the
modules that are there changes, where it would look at this rank's rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bharat.plan.cut_modules import become
from lightning_bharat.plan.exchange import ProcessPeers, copy, reduce

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def normalize_over_ranks(module: nn.Module, group: dist.ProcessGroup) -> int:
    """Let every batch norm in ``module`` take its statistics over the rows of ``group``; the number of them.

    Each row counts the same. All ranks of ``group`` must then run the same of them in training.
    """
    peers, found = ProcessPeers(group), 0
    for part in module.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.process_group = part.process_group or group
        elif isinstance(part, _KINDS):
            become(part, OverRanks, peers=peers)
        else:
            continue
        found += 1
    return found


class OverRanks:
    """Mixed into a batch norm."""

    peers: ProcessPeers

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(x)  # type: ignore[misc]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(x.ndim) if d != 1]
        sums = self._over_ranks(torch.cat([wide.sum(dims), wide.new_full((1,), x.numel() / x.shape[1])]))
        count = sums[-1].detach()
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        mean = sums[:-1] / count
        shape = [1, -1, *[1] * (x.ndim - 2)]
        centered = wide - mean.view(shape)
        variance = self._over_ranks(centered.square().sum(dims)) / count
        if self.training and self.track_running_stats:
            self._remember(mean.detach(), variance.detach() * count / (count - 1))
        out = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.to(out.dtype).view(shape) + self.bias.to(out.dtype).view(shape)
        return out.to(x.dtype)

    def _over_ranks(self, x: Tensor) -> Tensor:
        """The sum over the ranks, and in the backward pass the sum of their gradients."""
        return copy(reduce(x, self.peers), self.peers)

    @torch.no_grad()
    def _remember(self: Any, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)
