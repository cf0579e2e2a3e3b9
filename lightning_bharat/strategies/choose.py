"""``schedule="auto"``: the pipeline schedule whose order of work, played through with measured times, ends first."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.observe import observe_twice
from lightning_bharat.plan.partition import by_cost
from lightning_bharat.plan.times import BlockTimes, block_times
from lightning_bharat.strategies.dry_step import dry_step, first_batch
from lightning_bharat.strategies.memory import device_bytes, static_bytes
from lightning_bharat.strategies.microbatch import batch_size, parts, split
from lightning_bharat.strategies.orders import order_of
from lightning_bharat.strategies.recompute import recompute
from lightning_bharat.strategies.schedule import KINDS, Kind
from lightning_bharat.strategies.simulation import BACKWARD, FORWARD, INPUT, WEIGHT, Span, bubble, length, play

if TYPE_CHECKING:
    from lightning_bharat.strategies.hybrid import HybridStrategy

USABLE = 0.9  # of a device's memory; the rest is for buffers of collectives and fragments
CLOSE = 0.01  # steps whose lengths differ by less than this share are as long as each other


@dataclass(frozen=True)
class Predicted:
    """What a schedule would take.

    Attributes:
        name: of the schedule.
        microbatches: that a batch is divided into.
        seconds: of a step's forward and backward passes.
        bubble: share of the ranks' time in which they have no work.
        activations: bytes that the fullest rank keeps at once for backward passes.
    """

    name: str
    microbatches: int
    seconds: float
    bubble: float
    activations: float

    def __str__(self) -> str:
        return f"{self.name} {took(self.seconds, self.bubble)}"


def took(seconds: float, share: float) -> str:
    """The length and the bubble of a step, in words."""
    return f"{1e3 * seconds:.{0 if seconds > 0.1 else 2}f} ms (bubble {share:.1%})"


def legal(ranks: int, depth: int) -> dict[str, Kind]:
    """The schedules of so many ranks that have a block of ``depth`` for each stage."""
    return {name: kind for name, kind in KINDS.items() if kind.each * ranks <= depth}


def predict(
    name: str,
    ranks: int,
    microbatches: int,
    plan: ModelPlan,
    times: Mapping[str, BlockTimes],
    transfer: float,
    recomputed: bool = False,
) -> Predicted | None:
    """``None``: the schedule can't take that many micro-batches.

    Args:
        name: of the schedule.
        ranks: of the pipeline.
        plan: of the model.
        times: of a block on one of these micro-batches, by its kind.
        transfer: seconds that a hidden state of one takes from rank to rank.
        recomputed: whether blocks are computed again in the backward pass; where that of weights is apart, in both.
    """
    kind = KINDS[name]
    order = order_of(kind, ranks, microbatches)
    if order is None:
        return None
    seconds, kept = _of_stages(plan, times, ranks * kind.each)
    if recomputed:
        seconds |= {(stage, WEIGHT): seconds[stage, WEIGHT] + seconds[stage, FORWARD] for stage in range(len(kept))}
    spans = play(order, seconds, transfer)
    fullest = max(_peak([span for span in spans if span.rank == rank], kept) for rank in range(ranks))
    return Predicted(name, microbatches, length(spans), bubble(spans), fullest)


def _of_stages(
    plan: ModelPlan, times: Mapping[str, BlockTimes], stages: int
) -> tuple[dict[tuple[int, str], float], list[float]]:
    """Seconds by stage and kind of pass, and bytes of activations by stage. What is before and after the blocks counts
    as the share of a block that it costs by the plan."""
    blocks = [times[kind] for kind in plan.kinds]
    before, *costs, after = plan.costs or (0,) * (plan.depth + 2)
    mean = sum(costs) / len(costs)
    seconds: dict[tuple[int, str], float] = {}
    kept = []
    for stage, here in enumerate(by_cost(plan, stages)):
        counts = [(times_of, 1.0) for times_of in blocks[here.start : here.stop]]
        outside = (before if stage == 0 else 0) + (after if stage == stages - 1 else 0)
        if mean:
            counts.append((blocks[here.start], outside / mean))
        forward, inputs, weights = (
            sum(share * getattr(of, part) for of, share in counts) for part in ("forward", "inputs", "weights")
        )
        seconds |= {(stage, FORWARD): forward, (stage, INPUT): inputs, (stage, WEIGHT): weights}
        seconds[stage, BACKWARD] = inputs + weights
        kept.append(float(sum(blocks[i].kept for i in here)))
    return seconds, kept


def _peak(spans: Sequence[Span], kept: Sequence[float]) -> float:
    """Bytes at once: from a forward pass to the end of the backward pass of its weights."""
    events = [(span.start, kept[span.stage]) for span in spans if span.kind == FORWARD]
    events += [(span.end, -kept[span.stage]) for span in spans if span.kind in (BACKWARD, WEIGHT)]
    now = most = 0.0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def best(candidates: Sequence[Predicted], free: float) -> Predicted:
    """The shortest of those that fit into ``free`` bytes, with the fewest activations of equally short ones; if none
    fits, the one with the fewest."""
    fitting = [c for c in candidates if c.activations <= free]
    if not fitting:
        return min(candidates, key=lambda c: c.activations)
    shortest = min(c.seconds for c in fitting)
    return min((c for c in fitting if c.seconds <= shortest * (1 + CLOSE)), key=lambda c: c.activations)


# ---- on real ranks


def choose_schedule(
    strategy: HybridStrategy, trainer: pl.Trainer, module: pl.LightningModule, plan: ModelPlan
) -> tuple[Predicted, ...]:
    """What each schedule would take, the one to use first, and in the strategy's choices why. All ranks must call it.

    Returns:
        Nothing where nothing could be measured.
    """
    layout, device = strategy.layout, strategy.root_device
    kinds = legal(layout.pipeline, plan.depth)
    batch = first_batch(trainer)
    told = ""
    if strategy.is_global_zero:
        with isolate_rng(), strategy.alone():
            told = json.dumps(_measured(strategy, trainer, module, batch, kinds))
    found: dict[str, Any] = json.loads(strategy.broadcast(told))
    if "problem" in found:
        strategy.choices["schedule"] = f"1F1B: a block could not be measured alone: {found['problem']}"
        return ()
    recomputed = strategy.options.activation_checkpointing is not None
    candidates: list[Predicted | None] = []
    for number, of_kinds in found["times"].items():
        times = {kind: BlockTimes(**values) for kind, values in of_kinds.items()}
        assert strategy.pipeline_group is not None
        transfer = _transfer(max(t.sent for t in times.values()), strategy.pipeline_group, device)
        for name in (name for name, wanted in found["numbers"].items() if str(wanted) == number):
            candidates.append(predict(name, layout.pipeline, int(number), plan, times, transfer, recomputed))
    possible, free = [candidate for candidate in candidates if candidate is not None], _free(strategy, module)
    chosen = best(possible, free)
    others = sorted((c for c in possible if c is not chosen), key=lambda c: c.seconds)
    strategy.choices["schedule"] = _words(chosen, others, free)
    return chosen, *others


def _words(chosen: Predicted, others: Sequence[Predicted], free: float) -> str:
    lines = [f"{chosen}, predicted by measured blocks"]
    if others:
        lines.append(f"the others {', '.join(map(str, others))}")
    tight = [c for c in (chosen, *others) if c.activations > free]
    if chosen in tight:
        lines.append(f"it may not fit: {_gib(chosen.activations)} of activations, and {_gib(free)} are free")
    elif tight:
        lines.append(f"too large for {_gib(free)}: {', '.join(c.name for c in tight)}")
    return "; ".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _number(strategy: HybridStrategy, batch: Any, kind: Kind) -> int:
    """Micro-batches of ``batch`` under a schedule."""
    wanted = strategy.options.num_microbatches or 2 * strategy.layout.pipeline * kind.each
    if strategy.options.microbatch_fn is not None:
        return len(strategy.options.microbatch_fn(batch, wanted))
    return parts(batch_size(batch), wanted)


def _measured(
    strategy: HybridStrategy, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, kinds: Mapping[str, Kind]
) -> dict[str, Any]:
    """How many micro-batches each schedule has; by their number and the kind of a block, what it takes on one."""
    mode = strategy.options.activation_checkpointing

    def change(block: nn.Module) -> None:
        if mode:
            recompute(block, mode)

    cut = strategy.options.microbatch_fn or split
    try:
        numbers = {name: _number(strategy, batch, kind) for name, kind in kinds.items()}
        found: dict[str, Any] = {}
        for number in sorted(set(numbers.values())):
            seen = observe_twice(module, dry_step(trainer), cut(batch, number)[0])[0]
            times = block_times(module, seen, strategy.root_device, strategy.precision_plugin.forward_context, change)
            sharing = strategy.layout.tensor * strategy.layout.context
            found[str(number)] = {kind: _share(asdict(of), sharing) for kind, of in times.items()}
    except Exception as error:  # a person's code, in a block that is taken out of its model
        return {"problem": f"{type(error).__name__}: {error}"}
    return {"numbers": numbers, "times": found}


def _share(times: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What one of the tensor and context ranks does of it, without what they exchange."""
    return {name: value if name == "sent" else value / ranks for name, value in times.items()}


def _transfer(size: int, group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds that ``size`` bytes take between two neighbours of a pipeline, the slowest of all."""
    message, rank = torch.zeros(size, dtype=torch.uint8, device=device), group.rank()
    slowest = 0.0
    for left in range(group.size() - 1):
        if rank not in (left, left + 1):
            continue
        taken = []
        for _ in range(4):
            began = time.perf_counter()
            for source in (left, left + 1):
                if rank == source:
                    dist.send(message, group=group, group_dst=2 * left + 1 - rank)
                else:
                    dist.recv(message, group=group, group_src=source)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append((time.perf_counter() - began) / 2)
        slowest = max(slowest, median(taken[1:]))  # the first one connects
    found = torch.tensor(slowest, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _free(strategy: HybridStrategy, module: nn.Module) -> float:
    """Bytes for activations on the rank with the least."""
    layout = strategy.layout
    held = static_bytes(module, layout.data // layout.replicate, layout.tensor) / layout.pipeline
    mine = USABLE * device_bytes(strategy.root_device, strategy.num_processes) - held
    found = torch.tensor(mine, dtype=torch.float64, device=strategy.root_device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)
