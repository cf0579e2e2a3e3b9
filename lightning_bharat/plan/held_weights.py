"""The weights of each rank of a pipeline: what it holds between steps, and what of it is whole meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.memory import Memory, Spread, of_parameter, whole_bytes
from lightning_bharat.plan.partition import placed
from lightning_bharat.plan.schedules import Schedule
from lightning_bharat.plan.share import Setting, Share


@dataclass(frozen=True)
class Weights:
    """Bytes of whole parameters, and of those of them that are trained."""

    weights: float
    trained: float


@dataclass(frozen=True)
class Whole:
    """Of a rank's whole parameters: those of its experts, if they are spread, and the rest."""

    rest: Weights
    experts: Weights

    @property
    def weights(self) -> float:
        """Of all."""
        return self.rest.weights + self.experts.weights

    @property
    def trained(self) -> float:
        """Of all that are trained."""
        return self.rest.trained + self.experts.trained


class HeldWeights:
    """Of one number of tensor and of context ranks.

    Args:
        share: of each of them.
        units: names of the blocks that are gathered one at a time.
        stages: the blocks of each of a number of stages.
    """

    def __init__(self, share: Share, units: list[str], stages: Callable[[int], list[range]]) -> None:
        self.share, self.units, self.stages = share, units, stages
        self._parameters = dict(share.module.named_parameters())
        self._static, self._each, self._held = cache(self._static_of), cache(self._of_each), cache(self._all_held)
        self._whole, self.largest = cache(self._whole_of), cache(self._largest_of)

    def static(self, setting: Setting, rank: int) -> Memory:
        """What a rank of the pipeline holds between steps."""
        layout = setting.layout
        shards = layout.data // layout.replicate
        return self._static(layout.pipeline, setting.schedule, rank, shards, *_of_experts(layout))

    def whole(self, setting: Setting, rank: int) -> Whole:
        """The whole parameters of a rank of the pipeline."""
        return self._whole(setting.layout.pipeline, setting.schedule, rank, setting.layout.expert)

    @cached_property
    def outside(self) -> float:
        """Bytes of the parameters outside of blocks."""
        inside = {p for name in self.units for p in self.share.module.get_submodule(name).parameters()}
        return sum(whole_bytes(name, p) for name, p in self._parameters.items() if p not in inside)

    def _largest_of(self, expert: int, alone: bool = False) -> float:
        """Bytes of the largest block, with the experts of one of ``expert`` ranks; without, if each has its own
        ``alone``, which are not gathered."""
        spread, found = self._spread(expert, 1), []
        left = self.share.of_experts if alone else ()
        for name in self.units:
            block = self.share.module.get_submodule(name).named_parameters()
            named = ((f"{name}.{leaf}", p) for leaf, p in block)
            found.append(sum(whole_bytes(full, p, spread) for full, p in named if full not in left))
        return max(found, default=0)

    def _spread(self, expert: int, copies: int) -> Spread | None:
        return Spread(self.share.of_experts, expert, copies) if expert > 1 else None

    def _static_of(self, ranks: int, schedule: Schedule, rank: int, shards: int, expert: int, copies: int) -> Memory:
        held = self._held(ranks, schedule)[rank]
        parameters, gradients, optimizer = map(int, self._each(shards, expert, copies)[held].sum(0))
        gathered = 0.0
        if shards > 1 or expert > 1:
            whole = self._whole(ranks, schedule, rank, expert).weights
            gathered = whole if ranks > 1 else self.outside + self.largest(expert, expert > 1 and copies == 1)
        return Memory(parameters, gradients, optimizer, int(gathered))

    def _of_each(self, shards: int, expert: int, copies: int) -> np.ndarray:
        """Bytes of (parameters, 3): parameter, gradient and optimizer's states on the fullest data rank."""
        spread, state = self._spread(expert, copies), self.share.state
        firsts, alike = self._alike
        found = (of_parameter(name, self._parameters[name], shards, state, spread) for name in firsts)
        bytes = [(of.parameters, of.gradients, of.optimizer) for of in found]
        return np.array(bytes, dtype=np.int64).reshape(-1, 3)[alike]

    @cached_property
    def _alike(self) -> tuple[list[str], np.ndarray]:
        """The first parameter of each kind, by name, and which kind each is of."""
        kinds: dict[Any, str] = {}
        numbers = []
        for name, p in self._parameters.items():
            states = tuple((t.shape, t.dtype) for t in self.share.state.get(p, ()))
            kind = (p.shape, p.dtype, p.requires_grad, name in self.share.of_experts, states)
            kinds.setdefault(kind, name)
            numbers.append(list(kinds).index(kind))
        return list(kinds.values()), np.array(numbers, dtype=np.int64)

    def _all_held(self, ranks: int, schedule: Schedule) -> list[np.ndarray]:
        """Numbers of the parameters of each rank of a pipeline."""
        if ranks == 1:
            return [np.arange(len(self._parameters))]
        on = placed(self.share.module, self.share.plan, self.stages(ranks * schedule.each))
        rank_of = {stage: rank for rank in range(ranks) for stage in schedule.stages_of(rank, ranks)}
        held: list[list[int]] = [[] for _ in range(ranks)]
        for number, name in enumerate(self._parameters):
            for rank in {rank_of[stage] for stage in on[name]}:
                held[rank].append(number)
        return [np.array(numbers, dtype=np.int64) for numbers in held]

    def _whole_of(self, ranks: int, schedule: Schedule, rank: int, expert: int) -> Whole:
        held = self._held(ranks, schedule)[rank]
        bytes, apart = self._each(1, expert, 1)[held], self._is_expert[held] & (expert > 1)
        of_experts, rest = (bytes[where].sum(0) for where in (apart, ~apart))
        return Whole(Weights(float(rest[0]), float(rest[1])), Weights(float(of_experts[0]), float(of_experts[1])))

    @cached_property
    def _is_expert(self) -> np.ndarray:
        return np.array([name in self.share.of_experts for name in self._parameters], dtype=bool)


def are_alone(setting: Setting) -> bool:
    """Whether no two ranks have the same experts, so that they stay whole on their rank, and out of FSDP2."""
    layout = setting.layout
    return layout.expert > 1 and _of_experts(layout)[1] == layout.pipeline == 1 and not setting.offload


def _of_experts(layout: Layout) -> tuple[int, int]:
    """Expert ranks, and the ranks that have the same experts; without them nothing is divided differently."""
    return (layout.expert, layout.data * layout.context // layout.expert) if layout.expert > 1 else (1, 1)
