"""Bytes on the fullest rank and seconds of a step, of one layout in one setting, from what was counted of a model.

- *Weights, gradients, optimizer states* are divided as FSDP2 divides them (Rajbhandari et al., 2020, ZeRO stage 3,
  https://arxiv.org/abs/1910.02054); what is whole for a while is counted beside them.
- *Activations* are what autograd keeps (:mod:`lightning_bharat.plan.work`), times the micro-batches that the schedule
  keeps at once (Narayanan et al., 2021, https://arxiv.org/abs/2104.04473).
- *Compute* is floating-point operations at the cluster's efficiency: a backward pass takes two forward ones, one more
  with full recomputation. What comes beside matrix products and attention, and the optimizer's step, takes no time.
- *Communication* takes latency + bytes / bandwidth a message, rings of n ranks n - 1 messages of 1/n of the bytes
  (Thakur et al., 2005). Tensor ranks' exchanges and a pipeline's messages overlap with nothing. FSDP's gathers and
  reductions overlap with compute, all but one block's; under a pipeline, where weights stay whole for a step, with
  nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np
from torch import Tensor, nn

from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.cluster import Cluster, Link
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.memory import Memory, State, memory_per_rank, of_parameter
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.partition import by_cost, placed
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
        tensor, pipeline, data: communication that overlaps with no compute.
        host: to and from the host's memory.
        idle: waiting in the pipeline.
    """

    compute: float
    tensor: float = 0
    pipeline: float = 0
    data: float = 0
    host: float = 0
    idle: float = 0

    @property
    def total(self) -> float:
        """Of a step."""
        return self.compute + self.tensor + self.pipeline + self.data + self.host + self.idle

    @property
    def communication(self) -> float:
        """Share of the step that is communication."""
        return (self.tensor + self.pipeline + self.data + self.host) / self.total if self.total else 0.0

    @property
    def bubble(self) -> float:
        """Share of the step in which a rank waits for its pipeline."""
        return self.idle / self.total if self.total else 0.0


@dataclass(frozen=True)
class Share:
    """What one of several tensor ranks holds and does.

    Attributes:
        module: cut, on ``meta``.
        plan: by which it was cut.
        state: of its optimizers.
        growth: its work.
    """

    module: nn.Module
    plan: ModelPlan
    state: State
    growth: Growth


@dataclass(frozen=True)
class _Stage:
    """A micro-batch on one stage: bytes that stay and that come and go, seconds of a forward pass."""

    kept: float
    temporary: float
    compute: float
    exchange: float


class Estimate:
    """Bytes and seconds of the settings of one number of tensor ranks.

    Args:
        share: of each tensor rank.
        cluster: whose devices work.
    """

    def __init__(self, share: Share, cluster: Cluster) -> None:
        self.share, self.cluster = share, cluster
        self.units = find_units(share.module)
        self.work = cache(share.growth.at)
        self.stages = partial(_stages, share.plan.costs, share.plan.depth)
        self._static = cache(self._static_of)
        self._stages_of = cache(self._all_stages)
        self._held = cache(self._all_held)
        self._sizes = cache(self._sizes_of)
        self._parameters = dict(share.module.named_parameters())
        self._each = cache(self._of_each)

    # ---- bytes

    def bytes(self, setting: Setting) -> Bytes:
        """On the fullest rank."""
        return max(
            (self.on_rank(setting, rank) for rank in range(setting.layout.pipeline)), key=lambda bytes: bytes.total
        )

    def static(self, setting: Setting, rank: int) -> Memory:
        """What a rank of the pipeline holds between steps, on whatever memory."""
        layout = setting.layout
        return self._static(layout.data // layout.replicate, layout.pipeline, setting.schedule, rank)

    def on_rank(self, setting: Setting, rank: int) -> Bytes:
        """On a rank of the pipeline."""
        layout, schedule = setting.layout, setting.schedule
        static = self.static(setting, rank)
        mine = [
            self._stages_of(layout.pipeline * schedule.each, setting.rows, layout.tensor, setting.recompute)[i]
            for i in schedule.stages_of(rank, layout.pipeline)
        ]
        live = schedule.live(rank, layout.pipeline, setting.microbatches)
        kept = max(sum(n * stage.kept for n, stage in zip(most, mine, strict=True)) for most in live)
        buffers = self._buffers + max(stage.temporary for stage in mine)
        if layout.pipeline > 1:  # torch has a buffer for each message of a step, to every stage and back
            buffers += 2 * schedule.each * setting.microbatches * self.work(setting.rows).hidden
        held = (static.parameters, static.gradients, static.optimizer)
        on_device, on_host = ((0, 0, 0), sum(held)) if setting.offload else (held, 0)
        return Bytes(*on_device, self._whole(setting, rank), kept, buffers, on_host)

    def _static_of(self, shards: int, ranks: int, schedule: Schedule, rank: int) -> Memory:
        """On a rank of a pipeline of ``ranks`` ranks, with ``shards`` data ranks that divide each parameter."""
        if ranks == 1:
            return memory_per_rank(self.share.module, self.units, shards, self.share.state)
        held = self._held(ranks, schedule)[rank]
        parameters, gradients, optimizer = map(int, self._each(shards)[held].sum(0))
        return Memory(parameters, gradients, optimizer, int(self._each(1)[held, 0].sum()) if shards > 1 else 0)

    def _of_each(self, shards: int) -> np.ndarray:
        """Bytes of (parameters, 3): parameter, gradient and optimizer's states on the fullest data rank."""
        found = (of_parameter(p, shards, self.share.state) for p in self._parameters.values())
        return np.array([(of.parameters, of.gradients, of.optimizer) for of in found], dtype=np.int64).reshape(-1, 3)

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

    def _whole(self, setting: Setting, rank: int) -> float:
        """Weights and gradients that are whole at once, where they are divided over data ranks."""
        layout = setting.layout
        if layout.data == 1 and not setting.offload:
            return 0
        weights, trained = self._sizes(layout.pipeline, setting.schedule, rank)
        if layout.pipeline > 1:  # all of a stage, from the first micro-batch to the last
            return weights + trained
        outside, largest = self._units
        at_once = outside + 2 * largest  # the block that runs, and the next one, which is gathered ahead
        return at_once + (trained if setting.microbatches > 1 else min(outside + largest, trained))

    def _sizes_of(self, ranks: int, schedule: Schedule, rank: int) -> tuple[float, float]:
        """Bytes of a rank's whole parameters, and of those that are trained."""
        weights, trained, _ = self._each(1)[self._held(ranks, schedule)[rank]].sum(0)
        return float(weights), float(trained)

    @cached_property
    def _units(self) -> tuple[float, float]:
        """Bytes of the parameters outside of blocks, and of the largest block."""
        blocks = [set(self.share.module.get_submodule(name).parameters()) for name in self.units]
        inside = set().union(*blocks)
        return _size(p for p in self.share.module.parameters() if p not in inside), max(map(_size, blocks), default=0)

    @cached_property
    def _buffers(self) -> float:
        return _size(self.share.module.buffers())

    # ---- seconds

    def seconds(self, setting: Setting) -> Seconds:
        """Of a step."""
        layout, schedule, many = setting.layout, setting.schedule, setting.microbatches
        stages = self._stages_of(layout.pipeline * schedule.each, setting.rows, layout.tensor, setting.recompute)
        ranks = [[stages[i] for i in schedule.stages_of(r, layout.pipeline)] for r in range(layout.pipeline)]
        compute, exchange = max(
            ((sum(s.compute for s in mine), sum(s.exchange for s in mine)) for mine in ranks), key=sum
        )
        again = setting.recompute == "full"
        message = self._message(setting)
        forward = (compute + exchange) / schedule.each + message
        inputs = ((1 + again) * compute + (1 + again) * exchange) / schedule.each + message
        idle = (layout.pipeline - 1) * schedule.idle(forward, inputs, compute / schedule.each)
        passes = 2 + again
        working = many * ((3 + again) * compute + passes * exchange)
        return Seconds(
            compute=many * (3 + again) * compute,
            tensor=many * passes * exchange,
            pipeline=many * 2 * schedule.each * message,
            data=max(self._data(setting, rank, working) for rank in range(layout.pipeline)),
            host=max(self._host(setting, rank) for rank in range(layout.pipeline)) if setting.offload else 0,
            idle=idle,
        )

    def _message(self, setting: Setting) -> float:
        """Seconds that a hidden state takes from stage to stage."""
        layout = setting.layout
        if layout.pipeline == 1:
            return 0
        link = self.cluster.link(layout.pipeline, layout.devices // layout.pipeline)
        return link.latency + self.work(setting.rows).hidden / link.bandwidth

    def _data(self, setting: Setting, rank: int, working: float) -> float:
        """Seconds of the data ranks' exchanges that no compute hides."""
        layout = setting.layout
        if layout.data == 1:
            return 0
        weights, trained = self._sizes(layout.pipeline, setting.schedule, rank)
        shards, inner = layout.data // layout.replicate, layout.context * layout.tensor
        near = self.cluster.link(shards, inner)
        far = self.cluster.link(layout.replicate, inner * shards)
        copies = 2 * ring(far, layout.replicate, trained / shards)
        if layout.pipeline > 1:
            return ring(near, shards, weights) + ring(near, shards, trained) + copies
        outside, _ = self._units
        units = len(self.units)
        gathers = ring(near, shards, outside) + 2 * ring(near, shards, weights - outside, units)
        every = setting.microbatches * gathers + ring(near, shards, trained, units + 1) + copies
        return max(every - working, every / (setting.microbatches * (2 * units + 1)))

    def _host(self, setting: Setting, rank: int) -> float:
        """Seconds of weights to the device and gradients back, and of the optimizer's step in the host's memory."""
        assert self.cluster.host is not None
        static = self.static(setting, rank)
        gathers = 1 if setting.layout.pipeline > 1 else 2 * setting.microbatches
        moved = gathers * static.parameters + static.gradients
        return (moved + static.parameters + static.gradients + static.optimizer) / self.cluster.host.bandwidth

    def _all_stages(self, number: int, rows: int, tensor: int, recompute: str | None) -> list[_Stage]:
        """A micro-batch on each of ``number`` stages."""
        work, link = self.work(rows), self.cluster.link(tensor, 1)
        flops = self.cluster.flops * self.cluster.efficiency
        parts = [parts_of(blocks, self.share.plan.depth) for blocks in self.stages(number)]
        return [_stage(work, those, recompute, flops, link, tensor) for those in parts]


@cache
def _stages(costs: tuple[int, ...], depth: int, number: int) -> list[range]:
    """The same for every number of tensor ranks: blocks are divided by what they cost whole."""
    return by_cost(ModelPlan("", ("",) * depth, costs=costs), number)


def parts_of(blocks: range, depth: int) -> range:
    """Of a stage's blocks, the parts of :class:`~lightning_bharat.plan.work.Work` that run on it.

    >>> parts_of(range(0, 2), 4), parts_of(range(2, 4), 4)
    (range(0, 3), range(3, 6))
    """
    return range(blocks.start + (blocks.start > 0), blocks.stop + 1 + (blocks.stop == depth))


def ring(link: Link, ranks: int, bytes: float, messages: int = 1) -> float:
    """Seconds in which ``ranks`` ranks gather (or sum and divide) ``bytes`` in all, in ``messages`` goes.

    >>> ring(Link(bandwidth=100.0, latency=1.0), 4, 400)
    6.0
    """
    return (ranks - 1) * (messages * link.latency + bytes / ranks / link.bandwidth)


def _stage(work: Work, parts: range, recompute: str | None, flops: float, link: Link, tensor: int) -> _Stage:
    mine = [work.parts[i] for i in parts]
    moved = sum(part.gathered + 2 * part.summed for part in mine)
    times = sum(part.times for part in mine)
    return _Stage(
        kept=work.kept_bytes(parts, recompute),
        temporary=work.temporary_bytes(parts, recompute),
        compute=sum(part.flops for part in mine) / flops,
        exchange=(tensor - 1) * (times * link.latency + moved / tensor / link.bandwidth),
    )


def _size(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.itemsize for t in tensors)
