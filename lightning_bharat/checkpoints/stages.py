"""State that is spread over the stages of a pipeline, each of which holds other parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bharat.checkpoints.share import Share


class Stages:
    """The ranks of one pipeline, and what each has.

    Args:
        group: in the order of stages.
        holders: for each parameter (by the first of its names) the ranks of ``group`` that hold it, in order.
        device: through which ``group`` exchanges tensors.
    """

    def __init__(self, group: dist.ProcessGroup, holders: Mapping[str, list[int]], device: torch.device) -> None:
        self.group, self.holders, self.device = group, holders, device
        self.rank = dist.get_rank(group)

    def owner(self, name: str, module: nn.Module) -> int:
        """The rank whose value counts of ``name``, a parameter (its first name) or buffer of ``module``.

        A buffer belongs to the first rank that holds the parameters around it.
        """
        if name in self.holders:
            return self.holders[name][0]
        while name:
            name = name.rpartition(".")[0]
            for inside, _ in module.get_submodule(name).named_parameters(name):
                if inside in self.holders:
                    return self.holders[inside][0]
        return 0

    def together(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """``{parameter: {key: value}}`` of all stages; a :class:`Share` of another stage has no pieces here.

        All ranks of the pipeline must call it.
        """
        known = {
            name: {key: replace(v, pieces=()) if isinstance(v, Share) else v for key, v in entries.items()}
            for name, entries in state.items()
        }
        everywhere: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everywhere, known, group=self.group)
        merged: dict[str, dict[str, Any]] = {}
        for rank in everywhere:
            for name, entries in rank.items():
                merged.setdefault(name, dict(entries))
        return merged | {name: dict(entries) for name, entries in state.items()}

    def tell(self, owner: int, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor ``value`` of rank ``owner`` on all ranks of the pipeline, which must call it."""
        if self.rank == owner:
            assert value is not None
            told = value.to(self.device).contiguous()
        else:
            told = torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(told, group_src=owner, group=self.group)
        return told
