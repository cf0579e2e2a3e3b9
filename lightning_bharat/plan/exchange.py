"""What tensor ranks exchange in a cut, with its gradient (Megatron-LM, arXiv:1909.08053; sequence: arXiv:2205.05198).

The same functions run over a process group (:class:`ProcessPeers`) and between threads of one process
(:class:`ThreadPeers`), so that a proof runs exactly what training runs.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Peers(Protocol):
    """The tensor ranks that share a model, seen from one of them."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the peers, as a new tensor."""

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Concatenation along ``dim``, in the order of ranks."""

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """Sum over the peers; each keeps its piece along ``dim``."""

    def all_to_all(self, x: Tensor) -> Tensor:
        """(peers, \\*shape) to the same: row ``i`` goes to peer ``i``, and comes from it."""

    def all_max(self, x: Tensor) -> Tensor:
        """Maximum over the peers, as a new tensor."""


# torch 2.14 renamed them; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ProcessPeers:
    """Peers that are processes of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out, group=self.group)
        return out

    def all_max(self, x: Tensor) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return out

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        _all_gather(out, x, group=self.group)
        return out.movedim(0, dim).contiguous()  # as a person's view() expects

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        _reduce_scatter(out, x, group=self.group)
        return out.movedim(0, dim).contiguous()  # as a person's view() expects

    def all_to_all(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=self.group)
        return out


class OnePeer:
    """No cut: what one rank exchanges with itself."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_max(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        return x


class Table:
    """Where threads that play tensor ranks put down what they exchange."""

    def __init__(self, size: int, timeout: float) -> None:
        self.barrier, self.tensors = threading.Barrier(size, timeout=timeout), [torch.empty(0)] * size


class ThreadPeers:
    """Peers that are threads of this process. A peer that leaves early breaks the others' wait: nothing hangs.

    Raises:
        threading.BrokenBarrierError: a peer failed, exchanged something of another shape, or did not come in time.
    """

    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank, self.size = table, rank, table.barrier.parties

    def _everyone(self, x: Tensor) -> list[Tensor]:
        self.table.tensors[self.rank] = x.detach()
        self.table.barrier.wait()
        taken = list(self.table.tensors)
        self.table.barrier.wait()  # nobody overwrites before all have read
        if any(t.shape != x.shape for t in taken):
            raise threading.BrokenBarrierError(f"peers exchange {[tuple(t.shape) for t in taken]}")
        return taken

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._everyone(x)).sum(0)

    def all_max(self, x: Tensor) -> Tensor:
        return torch.stack(self._everyone(x)).amax(0)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._everyone(x), dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.all_reduce(x).chunk(self.size, dim)[self.rank].contiguous()

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.stack([sent[self.rank] for sent in self._everyone(x)])


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.peers.all_reduce(grad)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor) -> Tensor:
        return peers.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor, dim: int) -> Tensor:
        ctx.peers, ctx.dim = peers, dim
        return peers.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.peers.reduce_scatter(grad, ctx.dim), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor, dim: int) -> Tensor:
        ctx.peers, ctx.dim = peers, dim
        return peers.reduce_scatter(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.peers.all_gather(grad, ctx.dim), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor, dim: int) -> Tensor:
        ctx.peers, ctx.dim = peers, dim
        return x.chunk(peers.size, dim)[peers.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.peers.all_gather(grad, ctx.dim), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, x: Tensor, dim: int) -> Tensor:
        ctx.peers, ctx.dim = peers, dim
        return peers.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad.chunk(ctx.peers.size, ctx.dim)[ctx.peers.rank].contiguous(), None


class _CopyAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.peers, ctx.shapes = peers, [x.shape for x in tensors]
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        one = next(grad for grad in grads if grad is not None)
        used = one.new_tensor([grad is not None for grad in grads], dtype=one.dtype)
        whole = [one.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=True)]
        flat = ctx.peers.all_reduce(torch.cat([*(grad.reshape(-1) for grad in whole), used]))
        *pieces, by = flat.split([*(grad.numel() for grad in whole), len(grads)])
        # What no peer has used has no gradient, as on one rank. (To ask a device waits for it.)
        users = by.tolist() if any(grad is None for grad in grads) else [1] * len(grads)
        return None, *(
            piece.view(shape) if count else None for piece, shape, count in zip(pieces, ctx.shapes, users, strict=True)
        )


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peers: Peers, give: int, take: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.peers, ctx.give, ctx.take = peers, give, take
        parts = [torch.stack(x.chunk(peers.size, give)) for x in tensors]
        flat = peers.all_to_all(torch.cat([part.flatten(1) for part in parts], 1))
        pieces = flat.split([part[0].numel() for part in parts], 1)
        return tuple(
            torch.cat(piece.reshape(part.shape).unbind(), take) for piece, part in zip(pieces, parts, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, *_Exchange.apply(ctx.peers, ctx.take, ctx.give, *grads)


def copy(x: Tensor, peers: Peers) -> Tensor:
    """Enter a cut: the same value on all peers, whose gradients are summed."""
    return _Copy.apply(peers, x)


def copy_all(tensors: list[Tensor], peers: Peers) -> tuple[Tensor, ...]:
    """:func:`copy` for parameters of one dtype: one exchange for all of their gradients."""
    return _CopyAll.apply(peers, *tensors)


def reduce(x: Tensor, peers: Peers) -> Tensor:
    """Leave a cut: the sum of the peers' parts; the gradient goes to each of them."""
    return _Reduce.apply(peers, x)


def gather(x: Tensor, peers: Peers, dim: int) -> Tensor:
    """Enter a cut from a sequence that is divided along ``dim``: the whole sequence, gradients summed and divided."""
    return _Gather.apply(peers, x, dim)


def scatter(x: Tensor, peers: Peers, dim: int) -> Tensor:
    """Leave a cut towards a divided sequence: the sum of the peers' parts, of which each keeps its piece."""
    return _Scatter.apply(peers, x, dim)


def split(x: Tensor, peers: Peers, dim: int) -> Tensor:
    """Divide a sequence that all peers hold."""
    return _Split.apply(peers, x, dim)


def join(x: Tensor, peers: Peers, dim: int) -> Tensor:
    """Make a divided sequence whole, for what all peers then compute alike."""
    return _Join.apply(peers, x, dim)


def exchange(tensors: list[Tensor], peers: Peers, give: int, take: int) -> tuple[Tensor, ...]:
    """Give each peer its piece along ``give`` of tensors that are pieces along ``take``: they are then whole along
    ``take``. One exchange for all of them; ``give`` and ``take`` count from the end."""
    return _Exchange.apply(peers, give, take, *tensors)
