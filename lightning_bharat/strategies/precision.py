"""Gradients seen as one vector over all ranks: its norm, clipping, and a scaler that decides alike everywhere.

Lightning's precision plugins stay what they are; :func:`across_ranks` gives one of them the methods that must look
beyond this rank's pieces, so that an overridden ``configure_gradient_clipping`` goes through them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any, TypeAlias, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    FSDPPrecision,
    Precision,
    TransformerEnginePrecision,
    XLAPrecision,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement
from torch.optim import Optimizer

from lightning_bharat.strategies._torch import agree_after, version

P = TypeVar("P", bound=Precision)
_OF_OTHERS = (BitsandbytesPrecision, DeepSpeedPrecision, FSDPPrecision, TransformerEnginePrecision, XLAPrecision)
Groups = Callable[[Tensor], Iterable[dist.ProcessGroup]]
# By mesh and placements, the groups over which gradients there are divided: a mesh takes long to look one up.
Divided: TypeAlias = dict[tuple[DeviceMesh, tuple[Placement, ...]], list[dist.ProcessGroup]]
Stages = Callable[[], tuple[dist.ProcessGroup | None, Callable[[Tensor], int]]]


class AcrossRanks(Precision):
    """Mixed into a precision plugin: clipping over all pieces of all ranks.

    Attributes:
        groups_of: the process groups over which a parameter is divided (beyond what its ``DTensor`` says).
        stages: the pipeline's ranks, which have other parameters, and how many of them hold one.
        norm_device: where norms are exchanged (``device`` is a name of Lightning's own plugins).
        backward_ended: called before a person's hooks may read gradients.
        in_hooks: what these hooks run in.
    """

    groups_of: Groups
    stages: Stages
    norm_device: torch.device
    backward_ended: Callable[[], None]
    in_hooks: Callable[[], AbstractContextManager]
    _known_norm: tuple[Tensor | None, list[tuple[Tensor, int]]] = (None, [])

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        self.backward_ended()
        with self.in_hooks():
            return super().post_backward(tensor, module)

    def _after_closure(self, *args: Any, **kwargs: Any) -> None:
        with self.in_hooks():
            super()._after_closure(*args, **kwargs)

    @torch.no_grad()
    def norm_of(self, optimizer: Optimizer) -> Tensor:
        """The norm of the gradients of ``optimizer`` over all ranks, which all call it. Clipping takes it, too, unless
        a gradient is another one by then."""
        parameters = self._with_gradients(optimizer)
        as_they_are = [(p.grad, version(p.grad)) for p in parameters if p.grad is not None]
        known, seen = self._known_norm
        if known is None or not _are_same(seen, as_they_are):
            known = total_norm(parameters, self.groups_of, 2.0, self.norm_device, self.stages())
        self._known_norm = known, as_they_are
        return known

    @torch.no_grad()
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Scale the gradients of ``optimizer`` so that their norm over all ranks is at most ``clip_val``."""
        parameters = self._with_gradients(optimizer)
        total = self.norm_of(optimizer)
        self._known_norm = None, []  # it holds gradients
        scale = (clip_val / (total + 1e-6)).clamp(max=1.0)
        for grads in _by_kind(parameters):
            torch._foreach_mul_(grads, scale.to(grads[0]))

    def _with_gradients(self, optimizer: Optimizer) -> list[Tensor]:
        return [p for p in self.main_params(optimizer) if p.grad is not None]

    @torch.no_grad()
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clamp each gradient of ``optimizer`` to [-clip_val, clip_val]."""
        for grads in _by_kind(self.main_params(optimizer)):
            torch._foreach_clamp_min_(grads, -clip_val)
            torch._foreach_clamp_max_(grads, clip_val)


def _are_same(one: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    return len(one) == len(other) and all(a is c and b == d for (a, b), (c, d) in zip(one, other, strict=True))


def refuse_precision(plugin: Precision) -> None:
    """Raise for a plugin that leaves part of its work to another strategy, or that replaces a module's layers.

    Raises:
        MisconfigurationException: names the plugin and what to write.
    """
    if isinstance(plugin, _OF_OTHERS):
        raise MisconfigurationException(
            f"{type(plugin).__name__} does not work with bharat_hybrid; write Trainer(precision=...) with one of "
            '"32-true", "64-true", "bf16-true", "16-true", "bf16-mixed" or "16-mixed"'
        )


def across_ranks(plugin: P, groups_of: Groups, device: torch.device, stages: Stages) -> P:
    """Make ``plugin`` clip and scale over all ranks. All ranks must then take optimizer steps together."""
    if not isinstance(plugin, AcrossRanks):
        kind = type(plugin)
        plugin.__class__ = type(kind.__name__, (AcrossRanks, kind), {})
        plugin.backward_ended, plugin.in_hooks = _nothing, nullcontext  # type: ignore[attr-defined]
    plugin.groups_of, plugin.norm_device, plugin.stages = groups_of, device, stages  # type: ignore[attr-defined]
    scaler: Any = getattr(plugin, "scaler", None)
    if scaler is not None:
        agree_after(scaler, _agree)
    return plugin


def forget_module(plugin: Precision) -> None:
    """Let ``plugin`` tell no module any more when a backward pass has ended, nor hold one."""
    plugin.backward_ended, plugin.in_hooks = _nothing, nullcontext  # type: ignore[attr-defined]


def _nothing() -> None: ...


def _agree(flags: list[Tensor]) -> None:
    """What one rank saw not to be finite, no rank steps with."""
    if dist.is_initialized():
        for flag in flags:
            dist.all_reduce(flag, dist.ReduceOp.MAX)


@torch.no_grad()
def total_norm(
    parameters: Iterable[Tensor],
    groups_of: Groups,
    norm_type: float = 2.0,
    device: torch.device | None = None,
    stages: tuple[dist.ProcessGroup | None, Callable[[Tensor], int]] = (None, lambda _: 1),
) -> Tensor:
    """The ``norm_type``-norm of all gradients as one vector, each element of a whole gradient counted once.

    Gradients may live on several meshes and in plain pieces. All ranks must call it with the same parameters.

    Returns:
        0-dimensional, in float32, or float64 where a gradient is.
    """
    with torch._C.DisableTorchFunction():  # it is called in hooks too, in which norms are taken for whole ones
        return _total_norm(parameters, groups_of, norm_type, device or torch.device("cpu"), *stages)


def _total_norm(
    parameters: Iterable[Tensor],
    groups_of: Groups,
    norm_type: float,
    device: torch.device,
    pipeline: dist.ProcessGroup | None,
    copies: Callable[[Tensor], int],
) -> Tensor:
    parts: dict[tuple[int, tuple[dist.ProcessGroup, ...]], list[Tensor]] = {}
    known: Divided = {}
    dtype = torch.float32
    for parameter in parameters:
        if parameter.grad is None:
            continue
        grad, groups = local_piece(parameter.grad, known)
        over = tuple(dict.fromkeys((*groups, *groups_of(parameter))))
        parts.setdefault((copies(parameter), over), []).append(grad)
        dtype = torch.promote_types(dtype, grad.dtype)
    sums = {key: _sum_of_powers(grads, norm_type, dtype, device) for key, grads in parts.items()}
    operation = dist.ReduceOp.MAX if norm_type == inf else dist.ReduceOp.SUM
    # Two groups may have the same members: these stay in the order of the parameters, as on all ranks.
    for group in sorted(dict.fromkeys(group for _, over in sums for group in over), key=_axis):
        inside = [key for key in sums if group in key[1]]
        packed = torch.stack([sums[key] for key in inside])
        dist.all_reduce(packed, operation, group=group)
        sums.update(zip(inside, packed.unbind(), strict=True))
    every = [value if norm_type == inf else value / times for (times, _), value in sums.items()]
    stacked = torch.stack(every) if every else torch.zeros(1, dtype=dtype, device=device)
    total = stacked.amax() if norm_type == inf else stacked.sum()
    if pipeline is not None:
        total = total.double()  # stages may hold other types
        dist.all_reduce(total, operation, group=pipeline)
    return total if norm_type == inf else total.pow(1 / norm_type)


def _axis(group: dist.ProcessGroup) -> tuple[int, ...]:
    """By which all ranks bring their groups into one order: how the members lie, as all groups of a mesh's axis do.

    (Names of groups are counted, differ between ranks, and "10" comes before "9".)
    """
    ranks = dist.get_process_group_ranks(group)
    return tuple(rank - ranks[0] for rank in ranks)


def _sum_of_powers(grads: list[Tensor], norm_type: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    held = [grad for grad in grads if grad.numel()]
    if not held:
        return torch.zeros((), dtype=dtype, device=device)
    norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(held, norm_type, dtype=dtype)])
    return norms.amax() if norm_type == inf else norms.pow(norm_type).sum()


def local_piece(grad: Tensor, known: Divided) -> tuple[Tensor, list[dist.ProcessGroup]]:
    """This rank's piece of a gradient, and the groups over which its mesh divides it."""
    if not isinstance(grad, DTensor):
        return grad, []
    if any(isinstance(placement, Partial) for placement in grad.placements):
        whole = [Replicate() if isinstance(placement, Partial) else placement for placement in grad.placements]
        grad = grad.redistribute(grad.device_mesh, whole)
    where = grad.device_mesh, tuple(grad.placements)
    if where not in known:
        divided = [axis for axis, placement in enumerate(grad.placements) if not placement.is_replicate()]
        known[where] = [grad.device_mesh.get_group(axis) for axis in divided]
    return grad.to_local(), known[where]


def _by_kind(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Local gradients that one ``_foreach`` call can take."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            if grad.numel():
                kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(kinds.values())
