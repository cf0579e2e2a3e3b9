"""Bytes on the fullest rank and seconds of a step, of one layout in one setting, from what was counted of a model.

- *Weights, gradients, optimizer states* are divided as FSDP2 divides them (Rajbhandari et al., 2020, ZeRO stage 3,
  https://arxiv.org/abs/1910.02054); what is whole for a while is counted beside them.
- *Activations* are what autograd keeps (:mod:`lightning_bharat.plan.work`), times the micro-batches that the schedule
  keeps at once (Narayanan et al., 2021, https://arxiv.org/abs/2104.04473).
- *Compute* is floating-point operations at the cluster's efficiency: a backward pass takes two forward ones, one more
  with full recomputation. What comes beside matrix products and attention, and the optimizer's step, takes no time.
- *Communication* takes latency + bytes / bandwidth a message, rings of n ranks n - 1 messages of 1/n of the bytes
  (Thakur et al., 2005), all-to-alls one message's latency. Exchanges of tensor, context and expert ranks and a
  pipeline's messages overlap with nothing. FSDP's gathers and reductions overlap with compute, all but one block's;
  under a pipeline, where weights stay whole for a step, with nothing.
- *Experts* have as many tokens each; their weights, gradients and states are divided over the ranks that have the same.
- *Context ranks* sum the gradients of each block in each backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial

from torch import Tensor

from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.cluster import Cluster, Link
from lightning_bharat.plan.held_weights import HeldWeights, Weights, are_alone
from lightning_bharat.plan.memory import Memory
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.moved import NOTHING, Moved
from lightning_bharat.plan.partition import by_cost
from lightning_bharat.plan.share import Bytes, Seconds, Setting, Share
from lightning_bharat.plan.work import Work


@dataclass(frozen=True)
class _Stage:
    """A micro-batch on one stage: bytes that stay and that come and go, seconds of a forward pass, and of the sums of
    gradients in a backward pass."""

    kept: float
    temporary: float
    compute: float
    tensor: float
    context: float
    expert: float
    sums: float

    @property
    def exchange(self) -> float:
        return self.tensor + self.context + self.expert


class Estimate:
    """Bytes and seconds of the settings of one number of tensor and of context ranks.

    Args:
        share: of each of these ranks.
        cluster: whose devices work.
    """

    def __init__(self, share: Share, cluster: Cluster) -> None:
        self.share, self.cluster = share, cluster
        self.units = find_units(share.module)
        self.work = cache(share.work)
        self.stages = partial(_stages, share.plan.costs, share.plan.depth)
        self.held = HeldWeights(share, self.units, self.stages)
        self._stages_of, self._sums = cache(self._all_stages), cache(self._sums_of)

    # ---- bytes

    def bytes(self, setting: Setting) -> Bytes:
        """On the fullest rank."""
        return max(
            (self.on_rank(setting, rank) for rank in range(setting.layout.pipeline)), key=lambda bytes: bytes.total
        )

    def static(self, setting: Setting, rank: int) -> Memory:
        """What a rank of the pipeline holds between steps, on whatever memory."""
        return self.held.static(setting, rank)

    def on_rank(self, setting: Setting, rank: int) -> Bytes:
        """On a rank of the pipeline."""
        layout, schedule = setting.layout, setting.schedule
        static = self.static(setting, rank)
        mine = self._of_rank(setting, rank)
        live = schedule.live(rank, layout.pipeline, setting.microbatches)
        kept = max(sum(n * stage.kept for n, stage in zip(most, mine, strict=True)) for most in live)
        buffers = self._buffers + max(stage.temporary for stage in mine)
        if layout.pipeline > 1:  # torch has a buffer for each message of a step, to every stage and back
            buffers += 2 * schedule.each * setting.microbatches * self._hidden(setting)
        if layout.context > 1:  # the gradients of a block side by side, and their sum
            buffers += 2 * max(self._sums(layout.expert > 1))
        held = (static.parameters, static.gradients, static.optimizer)
        on_device, on_host = ((0, 0, 0), sum(held)) if setting.offload else (held, 0)
        return Bytes(*on_device, self._whole(setting, rank), kept, buffers, on_host)

    def _whole(self, setting: Setting, rank: int) -> float:
        """Weights and gradients that are whole at once, where they are divided over data ranks."""
        layout = setting.layout
        if layout.data == layout.expert == 1 and not setting.offload:
            return 0
        whole, alone = self.held.whole(setting, rank), are_alone(setting)
        if layout.pipeline > 1:  # all of a stage, from the first micro-batch to the last
            return whole.weights + whole.trained
        outside, largest = self.held.outside, self.held.largest(layout.expert, alone)
        at_once = outside + 2 * largest  # the block that runs, and the next one, which is gathered ahead
        trained = whole.rest.trained if alone else whole.trained
        return at_once + (trained if setting.microbatches > 1 else min(outside + largest, trained))

    @cached_property
    def _buffers(self) -> float:
        return _size(self.share.module.buffers())

    def _sums_of(self, spread: bool) -> list[float]:
        """Bytes of the gradients of each block that context ranks sum: all but those of experts that are spread."""
        apart = self.share.of_experts if spread else ()
        names = self.share.plan.block_names(self.share.module)
        blocks = ((name, self.share.module.get_submodule(name)) for name in names)
        return [
            _size(p for leaf, p in block.named_parameters() if p.requires_grad and f"{name}.{leaf}" not in apart)
            for name, block in blocks
        ]

    # ---- seconds

    def seconds(self, setting: Setting) -> Seconds:
        """Of a step."""
        layout, schedule, many = setting.layout, setting.schedule, setting.microbatches
        ranks = (self._of_rank(setting, rank) for rank in range(layout.pipeline))
        mine = max(ranks, key=lambda stages: sum(stage.compute + stage.exchange + stage.sums for stage in stages))
        compute, exchange, sums = (sum(getattr(s, of) for s in mine) for of in ("compute", "exchange", "sums"))
        again = setting.recompute == "full"
        message = self._message(setting)
        forward = (compute + exchange) / schedule.each + message
        inputs = ((1 + again) * (compute + exchange) + sums) / schedule.each + message
        idle = (layout.pipeline - 1) * schedule.idle(forward, inputs, compute / schedule.each)
        passes = 2 + again
        working = many * ((3 + again) * compute + passes * exchange + sums)
        return Seconds(
            compute=many * (3 + again) * compute,
            tensor=many * passes * sum(stage.tensor for stage in mine),
            context=many * (passes * sum(stage.context for stage in mine) + sums),
            expert=many * passes * sum(stage.expert for stage in mine),
            pipeline=many * 2 * schedule.each * message,
            data=max(self._data(setting, rank, working) for rank in range(layout.pipeline)),
            host=max(self._host(setting, rank) for rank in range(layout.pipeline)) if setting.offload else 0,
            idle=idle,
        )

    def _hidden(self, setting: Setting) -> float:
        return self.work(setting.layout.expert, setting.rows).hidden

    def _message(self, setting: Setting) -> float:
        """Seconds that a hidden state takes from stage to stage."""
        layout = setting.layout
        if layout.pipeline == 1:
            return 0
        link = self.cluster.link(layout.pipeline, layout.devices // layout.pipeline)
        return link.latency + self._hidden(setting) / link.bandwidth

    def _data(self, setting: Setting, rank: int, working: float) -> float:
        """Seconds of the data ranks' exchanges that no compute hides."""
        layout = setting.layout
        if layout.data == layout.expert == 1:
            return 0
        whole = self.held.whole(setting, rank)
        shards, inner = layout.data // layout.replicate, layout.context * layout.tensor
        near = partial(ring, self.cluster.link(shards, inner), shards)
        units, spread = len(self.units), self._with_experts
        far = self.cluster.link(layout.replicate, inner * shards)
        copies = 2 * ring(far, layout.replicate, whole.rest.trained / shards, units // layout.pipeline + 1)
        same = layout.data * layout.context // layout.expert  # ranks with the same experts
        of_experts = partial(ring, self.cluster.link(same, layout.tensor * layout.expert), same)
        if layout.pipeline > 1:
            return near(whole.rest.weights) + near(whole.rest.trained) + _both(of_experts, whole.experts) + copies
        outside = self.held.outside
        gathers = near(outside) + 2 * near(whole.rest.weights - outside, units)
        gathers += 2 * of_experts(whole.experts.weights, spread)
        every = setting.microbatches * gathers + near(whole.rest.trained, units + 1) + copies
        every += of_experts(whole.experts.trained, spread)
        if not self.cluster.overlap:
            return every
        return max(every - working, every / (setting.microbatches * (2 * units + 1)))

    @cached_property
    def _with_experts(self) -> int:
        """Modules of experts, which are gathered by themselves."""
        return len(self.share.fused)

    def _host(self, setting: Setting, rank: int) -> float:
        """Seconds of weights to the device and gradients back, and of the optimizer's step in the host's memory."""
        assert self.cluster.host is not None
        static = self.static(setting, rank)
        gathers = 1 if setting.layout.pipeline > 1 else 2 * setting.microbatches
        moved = gathers * static.parameters + static.gradients
        return (moved + static.parameters + static.gradients + static.optimizer) / self.cluster.host.bandwidth

    # ---- stages

    def _of_rank(self, setting: Setting, rank: int) -> list[_Stage]:
        """A micro-batch on each stage of a rank of the pipeline."""
        layout = setting.layout
        every = self._stages_of(
            layout.pipeline * setting.schedule.each,
            setting.rows,
            (layout.tensor, layout.context, layout.expert),
            setting.recompute,
        )
        return [every[i] for i in setting.schedule.stages_of(rank, layout.pipeline)]

    def _all_stages(self, number: int, rows: int, ranks: tuple[int, int, int], recompute: str | None) -> list[_Stage]:
        """A micro-batch on each of ``number`` stages."""
        return [self._stage(self.work(ranks[2], rows), blocks, ranks, recompute) for blocks in self.stages(number)]

    def _stage(self, work: Work, blocks: range, ranks: tuple[int, int, int], recompute: str | None) -> _Stage:
        tensor, context, expert = ranks
        parts = parts_of(blocks, self.share.plan.depth)
        mine = [work.parts[i] for i in parts]
        sums = sum(self._sums(expert > 1)[i] for i in blocks) if context > 1 else 0
        return _Stage(
            kept=work.kept_bytes(parts, recompute),
            temporary=work.temporary_bytes(parts, recompute),
            compute=sum(part.flops for part in mine) / (self.cluster.flops * self.cluster.efficiency),
            tensor=self._exchanging(_sum(part.tensor for part in mine), tensor, 1),
            context=self._exchanging(_sum(part.context for part in mine), context, tensor),
            expert=self._exchanging(_sum(part.expert for part in mine), expert, tensor),
            sums=2 * ring(self.cluster.link(context, tensor), context, sums, len(blocks)),
        )

    def _exchanging(self, moved: Moved, ranks: int, stride: int) -> float:
        """Seconds in which ``ranks`` ranks, ``stride`` apart, exchange ``moved``."""
        in_rings = ring(self.cluster.link(ranks, stride), ranks, moved.gathered + 2 * moved.summed, moved.times)
        return in_rings + self.cluster.all_to_all(ranks, stride, moved.swapped, moved.swaps)


def _both(seconds: Callable[[float], float], weights: Weights) -> float:
    return seconds(weights.weights) + seconds(weights.trained)


def _sum(every: Iterable[Moved]) -> Moved:
    return sum(every, NOTHING)


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


def ring(link: Link, ranks: int, bytes: float, messages: float = 1) -> float:
    """Seconds in which ``ranks`` ranks gather (or sum and divide) ``bytes`` in all, in ``messages`` goes.

    >>> ring(Link(bandwidth=100.0, latency=1.0), 4, 400)
    6.0
    """
    return (ranks - 1) * (messages * link.latency + bytes / ranks / link.bandwidth)


def _size(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.itemsize for t in tensors)
