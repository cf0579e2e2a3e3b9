"""What the planner plans with: a rank's share of a model, a setting, and what it takes in bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from torch import nn

from lightning_bharat.plan.experts import FusedExperts, find_experts
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.memory import State
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.schedules import NONE, Schedule
from lightning_bharat.plan.work import Growth, Work


@dataclass(frozen=True)
class Setting:
    """A layout, and all else that decides what a rank holds and does in a step.

    Attributes:
        microbatches: parts of a data rank's batch: the pipeline's, or batches whose gradients are accumulated.
        rows: of a micro-batch.
        recompute: ``activation_checkpointing`` of the strategy.
    """

    layout: Layout
    microbatches: int
    rows: int
    schedule: Schedule = NONE
    recompute: str | None = None
    offload: bool = False


@dataclass(frozen=True)
class Bytes:
    """On the fullest rank's device.

    Attributes:
        parameters, gradients, optimizer: as :class:`~lightning_bharat.plan.memory.Memory`; 0 where offloaded.
        gathered: weights and gradients that are whole over data ranks at the same time.
        activations: kept for backward passes, of all micro-batches that are under way.
        buffers: the module's own, a pipeline's messages, and what comes and goes while one block runs.
        host: of what is offloaded, in the host's memory.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    buffers: float
    host: float = 0

    @property
    def total(self) -> float:
        """On the device."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.activations + self.buffers


@dataclass(frozen=True)
class Seconds:
    """Of a step, on the rank that has most to do.

    Attributes:
        compute: forward, backward and recomputation.
        tensor, context, expert, pipeline, data: communication that overlaps with no compute.
        host: to and from the host's memory.
        idle: waiting in the pipeline.
    """

    compute: float
    tensor: float = 0
    context: float = 0
    expert: float = 0
    pipeline: float = 0
    data: float = 0
    host: float = 0
    idle: float = 0

    @property
    def total(self) -> float:
        """Of a step."""
        return sum(vars(self).values())

    @property
    def communication(self) -> float:
        """Share of the step that is communication."""
        return (self.total - self.compute - self.idle) / self.total if self.total else 0.0

    @property
    def bubble(self) -> float:
        """Share of the step in which a rank waits for its pipeline."""
        return self.idle / self.total if self.total else 0.0


@dataclass(frozen=True)
class Share:
    """What a rank holds and does, for one number of tensor and of context ranks.

    Attributes:
        module: cut over tensor ranks, with all experts, on ``meta``.
        plan: by which it was cut.
        state: of its optimizers.
        growth: its work.
        spread: its work with experts spread over expert ranks; ``None`` where they can't be.
    """

    module: nn.Module
    plan: ModelPlan
    state: State
    growth: Growth
    spread: Growth | None = None

    def work(self, expert: int, rows: int) -> Work:
        """Of a micro-batch. Over how many ranks experts are spread makes no difference: each has as many tokens."""
        growth = self.growth if expert == 1 else self.spread
        assert growth is not None
        return growth.at(rows)

    @cached_property
    def fused(self) -> list[FusedExperts]:
        """Its experts, if they can be spread."""
        return find_experts(self.module) if self.spread is not None else []

    @property
    def experts(self) -> int:
        """What numbers of expert ranks divide; 1 where there are no experts to spread."""
        return number_of(self.fused)

    @cached_property
    def of_experts(self) -> frozenset[str]:
        """Names of the parameters of experts."""
        return parameters_of(self.module, self.fused)


def number_of(experts: Iterable[FusedExperts]) -> int:
    """What numbers of expert ranks divide; 1 if there are none."""
    return gcd(*(each.experts for each in experts)) or 1


def parameters_of(module: nn.Module, experts: Iterable[FusedExperts]) -> frozenset[str]:
    """Names of the parameters of ``experts`` of ``module``."""
    return frozenset(
        f"{each.name}.{leaf}" for each in experts for leaf, _ in module.get_submodule(each.name).named_parameters()
    )
