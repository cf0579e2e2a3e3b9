"""The expert cut: each rank has some of the experts, and tokens travel to those that they chose and back.

As in GShard (Lepikhin et al., 2020, https://arxiv.org/abs/2006.16668), without a capacity: no token is dropped.

The module stays the person's: its own ``forward`` computes a rank's experts for the tokens that came, each of which has
one expert then. That this is right is proven (:mod:`prove_experts`) before it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.cut_modules import become
from lightning_bharat.plan.exchange import Table
from lightning_bharat.plan.shards import TensorSlice


@dataclass(frozen=True)
class FusedExperts:
    """A module whose parameters hold all experts side by side, along dimension 0.

    Its ``forward`` takes tokens (n, width), the experts that each chose (n, k) and their weights (n, k), and returns
    (n, width): the signature of Hugging Face's experts.

    Attributes:
        name: in the model.
        experts: how many there are.
        counts: names of its attributes that are this number.
    """

    name: str
    experts: int
    counts: tuple[str, ...]


def find_experts(module: nn.Module) -> list[FusedExperts]:
    """All modules with fused experts in ``module``, in order."""
    return [found for name, part in module.named_modules() if (found := _as_experts(name, part))]


def _as_experts(name: str, part: nn.Module) -> FusedExperts | None:
    parameters = list(part.parameters())
    own = list(part.parameters(recurse=False))
    if not own or len(own) != len(parameters) or not any(p.ndim == 3 for p in own) or min(p.ndim for p in own) < 2:
        return None
    sizes = {p.shape[0] for p in own}
    if len(sizes) > 1 or sizes == {1} or next(part.buffers(), None) is not None or _arguments(part) != 3:
        return None
    (experts,) = sizes
    same = (key for key, value in vars(part).items() if type(value) is int and value == experts)
    return FusedExperts(name, experts, tuple(key for key in same if "expert" in key))


def _arguments(part: nn.Module) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in inspect.signature(part.forward).parameters.values())


def check_experts(module: nn.Module, ranks: int) -> list[FusedExperts]:
    """The modules to cut over ``ranks`` expert ranks.

    Raises:
        PlanError: there are none, or their number does not divide.
    """
    found = find_experts(module)
    if not found:
        near = [f"{name} ({type(part).__name__})" for name, part in module.named_modules() if _is_near(part)]
        raise PlanError(
            f"expert_parallel_size={ranks}: no module of {type(module).__name__} holds fused experts"
            + (f"; {near[0]} is none" if near else "")
            + ". That is a module whose parameters all have the experts along dimension 0, (experts, out, in), and "
            "whose forward takes tokens (n, width), chosen experts (n, k) and weights (n, k). Write one, or leave "
            "expert_parallel_size out"
        )
    for each in found:
        if each.experts % ranks:
            fits = [n for n in range(1, each.experts + 1) if each.experts % n == 0]
            raise PlanError(
                f"expert_parallel_size={ranks} does not divide the {each.experts} experts of {each.name}; sizes that "
                f"do: {', '.join(map(str, fits[:8]))}"
            )
    _refuse_tied(module, found)
    return found


def _is_near(part: nn.Module) -> bool:
    """Whether a person may take it for fused experts."""
    listed = isinstance(part, nn.ModuleList) and len(part) > 1 and "expert" in type(part[0]).__name__.lower()
    return listed or any(p.ndim == 3 for p in part.parameters(recurse=False))


def _refuse_tied(module: nn.Module, found: list[FusedExperts]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for each in found:
        for parameter in module.get_submodule(each.name).parameters():
            if len(names[id(parameter)]) > 1:
                raise PlanError(
                    f"{' and '.join(names[id(parameter)])} are one tensor: experts that are used in two places can't "
                    "be cut; give each module its own, or leave expert_parallel_size out"
                )


class Routes(Protocol):
    """The expert ranks, seen from one of them."""

    rank: int
    size: int

    def depart(self, x: Tensor, received: list[int], sent: list[int]) -> Callable[[], Tensor]:
        """Rows of ``x`` begin to travel to all ranks, ``sent[i]`` of them to rank ``i``, in order. Waits for those that
        come when called: ``received[i]`` from rank ``i``."""


class ProcessRoutes:
    """Expert ranks that are processes of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def depart(self, x: Tensor, received: list[int], sent: list[int]) -> Callable[[], Tensor]:
        out, x = x.new_empty((sum(received), *x.shape[1:])), x.contiguous()
        work: Any = dist.all_to_all_single(out, x, received, sent, group=self.group, async_op=True)

        def arrive(_kept: Tensor = x) -> Tensor:  # what is sent must live until it is
            work.wait()
            return out

        return arrive


class ThreadRoutes:
    """Expert ranks that are threads of this process, for proofs.

    Raises:
        threading.BrokenBarrierError: another rank failed, or did not come in time.
    """

    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank, self.size = table, rank, table.barrier.parties

    def depart(self, x: Tensor, received: list[int], sent: list[int]) -> Callable[[], Tensor]:
        parts: Any = x.detach().split(sent)
        self.table.tensors[self.rank] = parts
        self.table.barrier.wait()
        taken = [parts[self.rank] for parts in self.table.tensors]
        self.table.barrier.wait()  # nobody overwrites before all have read
        return lambda: torch.cat(taken)


@dataclass
class _Trip:
    """Rows on their way, and their gradients on the way back, which is multiplied by ``factor``."""

    routes: Routes
    received: list[int]
    sent: list[int]
    factor: float = 1.0
    arrive: Callable[[], Tensor] | None = None

    def take(self, x: Tensor, meanwhile: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """The rows that come for ``x``, and what ``meanwhile`` returns, which is computed, and its gradients are, while
        rows travel."""
        ticket = _Depart.apply(x, self)
        beside = None if meanwhile is None else meanwhile()
        return _Arrive.apply(ticket, self), beside

    def there(self, x: Tensor) -> None:
        self.arrive = self.routes.depart(x, self.received, self.sent)

    def back(self, grad: Tensor) -> None:
        self.arrive = self.routes.depart(grad, self.sent, self.received)

    def wait(self) -> Tensor:
        assert self.arrive is not None
        arrive, self.arrive = self.arrive, None
        return arrive()


class _Depart(torch.autograd.Function):
    """Returns an empty ticket, through which the graph holds the two ends together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.there(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.trip.wait().mul_(ctx.trip.factor), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.trip.back(grad)
        return grad.new_zeros(()), None


class CutExperts(nn.Module):
    """Mixed into a module that keeps its rank's experts: expert ``i`` is on rank ``i // (experts // ranks)``.

    A rank's experts see the tokens of all expert ranks, so their gradients would be sums over these where data ranks
    have means: what goes back through experts is divided by the ranks, and multiplied again where it leaves them.
    (Context ranks have parts of one loss: their gradients are sums.)
    """

    routes: Routes
    experts_of_all: int
    losses: float

    @torch.compiler.disable  # how many tokens travel is known on the host alone
    def forward(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        plus: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """As the module's own, whose first three arguments these are, whatever their names.

        ``plus``: what it returns is added, and computed while tokens travel (as Megatron-Core overlaps shared experts).
        """
        routes, here = self.routes, self.experts_of_all // self.routes.size
        order = top_k_index.flatten().argsort(stable=True)
        load = top_k_index.new_zeros(self.experts_of_all).index_add(
            0, top_k_index.flatten(), torch.ones_like(top_k_index.flatten())
        )
        even = [here] * routes.size
        loads = routes.depart(load, even, even)().view(routes.size, here)  # what each rank has for each expert here
        # The only wait of the host: NCCL and gloo take the sizes of an all-to-all from it.
        # (In a dry run, a fake tensor's own tolist would ask for each number.)
        sent, received = Tensor.tolist(torch.stack((load.view(loads.shape).sum(1), loads.sum(1))))
        rows = hidden[order // top_k_index.shape[1]]
        came, beside = _Trip(routes, received, sent, self.losses).take(rows, plus)
        back, _ = _Trip(routes, sent, received, 1 / self.losses).take(self._compute(came, loads))
        of_tokens = back[order.argsort()].unflatten(0, top_k_index.shape)
        out = (of_tokens * top_k_weights[..., None]).sum(1).type_as(hidden)
        return out if beside is None else out + beside

    def _compute(self, rows: Tensor, loads: Tensor) -> Tensor:
        """The module's own experts of ``rows``, which lie by rank and, of each rank, by expert."""
        ranks, here = loads.shape
        number = len(rows)
        every = torch.arange(here, device=rows.device).repeat(ranks)
        expert = every.repeat_interleave(loads.flatten(), output_size=number)  # a known size waits for no device
        if not number:
            # A row of zeros, of which nothing is used: the gradient of experts without tokens is then zero, not
            # missing, and data ranks find the same ones to average.
            rows, expert = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:]))), expert.new_zeros(1)
        return super().forward(rows, expert[:, None], rows.new_ones(len(rows), 1))[:number]


def cut_experts(part: nn.Module, found: FusedExperts, routes: Routes, losses: float | None = None) -> TensorSlice:
    """Let ``part`` keep its rank's experts.

    Args:
        part: real or on ``meta``.
        found: what it is.
        routes: the expert ranks.
        losses: the share of all ranks' losses that is theirs, of which gradients are the mean; as many as ranks if
            None.

    Returns:
        Which part of each parameter this rank has.
    """
    group = routes.group if isinstance(routes, ProcessRoutes) else None
    cut = TensorSlice(0, (found.experts,), routes.size, routes.rank, group)
    for leaf, whole in list(part.named_parameters(recurse=False)):
        piece = nn.Parameter(cut.take(whole.detach()), requires_grad=whole.requires_grad)
        piece.__dict__.update(whole.__dict__)
        part.register_parameter(leaf, piece)
    for attribute in found.counts:
        setattr(part, attribute, found.experts // routes.size)
    become(part, CutExperts, routes=routes, experts_of_all=found.experts, losses=losses or routes.size)
    return cut
