"""Tensors of which several ranks hold the same: who holds which, whether they still are the same, and who is apart.

Copies are not sent: each rank makes digests of what it holds, all of one place become one number, and one small
``all_reduce`` compares these numbers everywhere. Only where they differ do ranks tell each other more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_bharat.checkpoints.stages import Stages
from lightning_bharat.checkpoints.weights import parameter_names
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.strategies.buffers import kept_buffers
from lightning_bharat.strategies.data import local
from lightning_bharat.strategies.digest import digest

if TYPE_CHECKING:
    from lightning_bharat.strategies.hybrid import HybridStrategy

EVERYWHERE = ""
_LEAST = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Held:
    """A tensor that this rank holds.

    Attributes:
        name: of it, in words.
        place: ranks with a tensor of this name and place hold the same; :data:`EVERYWHERE`: all ranks do.
        tensor: what this rank has of it.
    """

    name: str
    place: str
    tensor: Tensor


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same on all ranks that should hold the same.

    Attributes:
        name: of it.
        ranks: that hold it.
        odd: of these, the ones that are apart from the majority; none where there is no majority.
    """

    name: str
    ranks: tuple[int, ...]
    odd: tuple[int, ...]


def held_by(strategy: HybridStrategy) -> Iterator[Held]:
    """Weights, states of optimizers and buffers of this rank, between two steps.

    A weight is divided where tensor or expert ranks hold slices of it, and where it is sharded over (some of the) data
    ranks, and lies on the pipeline stages that need it; it is the same everywhere else.
    """
    module = strategy.lightning_module
    assert module is not None

    def place_of(name: str, parameter: Tensor) -> str:
        stages = [f"stages {strategy.stages.holders.get(name)}"] if strategy.stages is not None else []
        slices = [f"slice {strategy.slices[name].rank}"] if name in strategy.slices else []
        return ", ".join([*stages, *slices, *_shards(parameter)])

    parameter_names(module)  # for its side: sharded parameters are in place
    parameters = {name: p for name, p in module.named_parameters() if not is_elsewhere(p)}
    places = {name: place_of(name, parameter) for name, parameter in parameters.items()}
    yield from _of_parameters(parameters, places, strategy.optimizers)
    for name, buffer in kept_buffers(module):
        if strategy.stages is None:
            yield Held(f"buffer {name}", EVERYWHERE, local(buffer))
        elif strategy.stages.rank in (ranks := _stages_around(name, module, strategy.stages)):
            yield Held(f"buffer {name}", f"stages {ranks}", local(buffer))


def _stages_around(name: str, module: nn.Module, stages: Stages) -> list[int]:
    """The pipeline's ranks that hold parameters of the nearest module around a buffer: they run it."""
    found = set[int]()
    while name and not found:
        name = name.rpartition(".")[0]
        inside = module.get_submodule(name).named_parameters(name)
        found = {rank for parameter, _ in inside for rank in stages.holders.get(parameter, ())}
    return sorted(found)


def held_whole(module: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[Held]:
    """The same where each rank holds the whole module. Without buffers, which DDP overwrites at each step."""
    parameters = dict(module.named_parameters())
    yield from _of_parameters(parameters, dict.fromkeys(parameters, EVERYWHERE), optimizers)


def _of_parameters(
    parameters: dict[str, nn.Parameter], places: dict[str, str], optimizers: Sequence[Optimizer]
) -> Iterator[Held]:
    for name, parameter in parameters.items():
        yield Held(name, places[name], local(parameter).detach())
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for stepped, state in optimizer.state.items():
            if (of := names.get(id(stepped))) is None:
                continue
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield Held(f"optimizer state {key} of {of}", places[of], local(value))


def _shards(parameter: Tensor) -> Iterator[str]:
    """Which shard it is, for each axis of its mesh over which it is not replicated."""
    if not isinstance(parameter, DTensor):
        return
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or range(mesh.ndim)
    for axis, (name, placement) in enumerate(zip(names, parameter.placements, strict=True)):
        if not isinstance(placement, Replicate):
            yield f"{name} {mesh.get_local_rank(axis)}"


class Replicas:
    """The places of all ranks. All ranks must make it, and call its methods, together.

    Args:
        held: what this rank holds.
        device: on which collectives want tensors.

    Attributes:
        exist: whether anything is on more than one rank.
    """

    def __init__(self, held: Iterable[Held], device: torch.device) -> None:
        self.device = device
        of_ranks: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(of_ranks, {entry.place for entry in held})
        self._ranks = {
            place: [rank for rank, places in enumerate(of_ranks) if place in places]
            for place in sorted(set[str]().union(*of_ranks))
        }
        self.exist = any(len(ranks) > 1 for ranks in self._ranks.values())
        self._ranks[EVERYWHERE] = list(range(len(of_ranks)))  # buffers may come later

    def compare(self, held: Iterable[Held]) -> list[Difference]:
        """What is not the same, in the order of ``held``; the same list on all ranks."""
        mine = self._digests(held)
        sums = torch.full((2, len(self._ranks)), _LEAST, dtype=torch.int64, device=self.device)
        for i, place in enumerate(self._ranks):
            if place in mine:
                sums[0, i] = one = _together(mine[place])
                sums[1, i] = ~one  # the largest of all complements is that of the smallest
        dist.all_reduce(sums, dist.ReduceOp.MAX)
        largest, smallest = sums[0].tolist(), (~sums[1]).tolist()
        # (of what no rank holds the smallest is above the largest)
        apart = [p for p, low, high in zip(self._ranks, smallest, largest, strict=True) if low < high]
        return self._ask(apart, mine) if apart else []

    def _digests(self, held: Iterable[Held]) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for entry in held:
            made = digest(entry.tensor).to(self.device, non_blocking=True)
            found.setdefault(entry.place, {})[entry.name] = made
        return found

    def _ask(self, places: list[str], mine: dict[str, dict[str, Tensor]]) -> list[Difference]:
        """Each tensor's own digest in these places, from all ranks that have one."""
        told = {place: {name: int(d) for name, d in mine[place].items()} for place in places if place in mine}
        of_ranks: list[dict[str, dict[str, int]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, told)
        found: list[Difference] = []
        for place in places:
            digests = {rank: of_ranks[rank].get(place, {}) for rank in self._ranks[place]}
            for name in dict.fromkeys(name for of_rank in digests.values() for name in of_rank):
                by_rank = {rank: of_rank.get(name) for rank, of_rank in digests.items()}
                if len(set(by_rank.values())) > 1:
                    found.append(Difference(name, tuple(by_rank), _odd_ones(by_rank)))
        return found


def _together(digests: dict[str, Tensor]) -> Tensor:
    """One digest of many, each times an odd number made of its name."""
    numbers = [xxhash.xxh3_64_intdigest(name.encode()) | 1 for name in digests]
    odd = torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers])
    every = torch.stack(list(digests.values()))
    return (every * odd.to(every.device)).sum()


def _odd_ones(by_rank: dict[int, int | None]) -> tuple[int, ...]:
    ((most, count),) = Counter(by_rank.values()).most_common(1)
    return tuple(rank for rank, value in by_rank.items() if value != most) if 2 * count > len(by_rank) else ()
