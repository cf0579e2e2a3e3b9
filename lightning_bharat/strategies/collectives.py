"""What Lightning exchanges between ranks: logged values, decisions, objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object

T = TypeVar("T")


def highest(trainer: Any, values: Sequence[int]) -> list[int]:
    """Each of ``values`` as the rank has it that has most. All ranks of ``trainer`` must call it."""
    return highest_of(trainer.strategy, values) if trainer.world_size > 1 else list(values)


def highest_of(strategy: Any, values: Sequence[int]) -> list[int]:
    """:func:`highest`, of all ranks of ``strategy``."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(map(int, values))
    numbers = torch.tensor(values, dtype=torch.int64, device=strategy.root_device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


class Collectives(_Base):
    """Mixed into a strategy whose data ranks are ``data_group``. Before processes are connected, there is one rank."""

    data_group: dist.ProcessGroup
    _is_alone = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Exchange nothing in here: a dry run of a person's step is on one rank."""
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    @property
    def _exchanges(self) -> bool:
        return dist.is_initialized() and not self._is_alone

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """``tensor`` over the ranks of ``group``, as a new tensor; what is not a tensor comes back as it is.

        By default over all ranks, of which tensor peers hold equal values; a sum goes over the data ranks alone, so
        that it counts nothing twice. The mean of whole numbers is a float64.
        """
        if not isinstance(tensor, Tensor) or not self._exchanges:
            return tensor
        if isinstance(tensor, DTensor):  # a loss in pieces, of a module that has cut itself
            tensor = tensor.full_tensor()
        operation = _operation(reduce_op)
        mean = operation == dist.ReduceOp.AVG
        if group is None and operation in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT):
            group = self.data_group
        out = tensor.detach().clone() if tensor.is_floating_point() or not mean else tensor.double()
        moved = out.to(self.root_device)
        dist.all_reduce(moved, dist.ReduceOp.SUM if mean else operation, group=group)
        if mean:
            moved /= dist.get_world_size(group)
        return moved.to(tensor.device)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks (``all=False``: any rank) decided so."""
        if not self._exchanges:
            return decision
        flag = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(flag, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(flag)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """(data ranks, \\*shape): tensor peers hold the same, so each value comes once."""
        everyone = group is None or group is dist.group.WORLD
        if not self._exchanges:
            return tensor
        with nullcontext() if sync_grads else torch.no_grad():
            return _Gathered.apply(tensor, self.data_group if everyone else group)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """``obj`` of rank ``src`` on all ranks."""
        if not self._exchanges:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        if self._exchanges:
            devices = [self.root_device.index] if dist.get_backend() == "nccl" else None
            dist.barrier(device_ids=devices)


class _Gathered(torch.autograd.Function):
    """Tensors of all ranks of a group; each gets the sum of what all ranks' losses say of its own.

    (The backward pass of ``torch.distributed.nn`` works on gloo for the group of all ranks alone.)
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        every = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(every, group=ctx.group)
        return every[ctx.group.rank()], None


def _operation(reduce_op: Any) -> Any:
    if not isinstance(reduce_op, str):
        return dist.ReduceOp.SUM if reduce_op is None else reduce_op
    name = "AVG" if reduce_op.lower() in ("mean", "avg") else reduce_op.upper()
    return getattr(dist.ReduceOp, name)
