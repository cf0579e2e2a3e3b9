"""Which part of a whole parameter a rank holds: the map from local tensors to whole ones.

A parameter may be cut twice: over tensor ranks (:class:`TensorSlice`, plain local tensors) and over data ranks (FSDP2:
a ``DTensor`` that is sharded on dimension 0 of the tensor rank's slice). Checkpoints, initialization and tests all go
through this one description.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class TensorSlice:
    """What one tensor rank (or expert rank) holds of a parameter.

    Along ``dim`` the whole parameter consists of ``parts`` (their sizes, in order: one for a plain linear, three for a
    fused query-key-value). Each part is divided into ``ranks`` equal pieces; rank ``rank`` holds its piece of every
    part, one after the other. ``group`` are the ranks that hold the other slices; ``None``: the tensor ranks.
    """

    dim: int
    parts: tuple[int, ...]
    ranks: int
    rank: int
    group: torch.distributed.ProcessGroup | None = field(default=None, compare=False)

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield (start in the whole, start in the slice, length) along ``dim``."""
        whole = local = 0
        for part in self.parts:
            length = part // self.ranks
            yield whole + self.rank * length, local, length
            whole, local = whole + part, local + length

    def take(self, whole: Tensor) -> Tensor:
        """This rank's slice of ``whole``, as a new tensor."""
        return torch.cat([whole.narrow(self.dim, start, length) for start, _, length in self.ranges()], self.dim)

    def shape_of_whole(self, local: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the whole parameter, from that of a slice."""
        return (*local[: self.dim], sum(self.parts), *local[self.dim + 1 :])

    def join(self, slices: list[Tensor]) -> Tensor:
        """The whole parameter from the slices of all tensor ranks, in their order."""
        sizes = [part // self.ranks for part in self.parts]
        split = [piece.split(sizes, self.dim) for piece in slices]
        return torch.cat([of_rank[i] for i in range(len(sizes)) for of_rank in split], self.dim)


@dataclass(frozen=True)
class Piece:
    """A rectangle of the whole parameter and the local memory that holds it."""

    offsets: tuple[int, ...]
    local: Tensor


def rows_of_shard(tensor: Tensor) -> tuple[int, Tensor]:
    """First row (along dimension 0) and local tensor of a ``DTensor`` that FSDP2 sharded; a plain tensor starts at 0.

    Raises:
        ValueError: the placements are not FSDP2's (replicated, or sharded along dimension 0).
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.detach()
    start, length = 0, tensor.shape[0] if tensor.ndim else 1
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard) and placement.dim == 0 and type(placement) is Shard:
            size = -(-length // tensor.device_mesh.size(axis))  # as torch.chunk: equal pieces, the last ones shorter
            first = min(tensor.device_mesh.get_local_rank(axis) * size, length)
            start, length = start + first, min(size, length - first)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"placements {tensor.placements} are not those of fully_shard along dimension 0")
    return start, tensor.to_local().detach()


def shape_of_whole(tensor: Tensor, cut: TensorSlice | None) -> tuple[int, ...]:
    """Shape of the whole parameter that ``tensor`` is a local part of."""
    return cut.shape_of_whole(tensor.shape) if cut else tuple(tensor.shape)


def pieces(tensor: Tensor, cut: TensorSlice | None) -> list[Piece]:
    """The rectangles of the whole parameter that this rank holds of ``tensor``, as views of its memory."""
    first, local = rows_of_shard(tensor)
    if local.ndim == 0:
        return [Piece((), local)]
    if local.numel() == 0:
        return []
    rest = (0,) * (local.ndim - 1)
    if cut is None:
        return [Piece((first, *rest), local)]
    if cut.dim > 0:
        return [
            Piece((first, *rest[: cut.dim - 1], start, *rest[cut.dim :]), local.narrow(cut.dim, inside, length))
            for start, inside, length in cut.ranges()
        ]
    found, last = [], first + local.shape[0]
    for start, inside, length in cut.ranges():
        low, high = max(inside, first), min(inside + length, last)
        if low < high:
            found.append(Piece((start + low - inside, *rest), local.narrow(0, low - first, high - low)))
    return found


@torch.no_grad()
def fill(tensor: Tensor, cut: TensorSlice | None, whole: Tensor) -> None:
    """Copy what this rank holds of ``whole`` into ``tensor``."""
    for piece in pieces(tensor, cut):
        index = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.local.shape, strict=True))
        piece.local.copy_(whole[index] if index else whole)


@torch.no_grad()
def gather(tensor: Tensor, cut: TensorSlice | None, tensor_group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The whole parameter on every rank. All ranks of the data mesh and of ``tensor_group`` (or the group that ``cut``
    names) must call it."""
    local = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    if cut is None:
        return local
    slices = [torch.empty_like(local) for _ in range(cut.ranks)]
    torch.distributed.all_gather(slices, local.contiguous(), group=cut.group or tensor_group)
    return cut.join(slices)
