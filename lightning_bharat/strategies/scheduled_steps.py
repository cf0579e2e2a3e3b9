"""Steps under a pipeline in the order of Lightning's loop: gradients made in ``training_step``, given in ``backward``.

Forward and backward passes of micro-batches are mixed by the schedule, so that gradients exist before Lightning's loop
has cleared the old ones and called its hooks. They are put aside until ``backward``, where every hook finds what it
finds without a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_bharat.checkpoints.stages import Stages
from lightning_bharat.strategies.choose import took
from lightning_bharat.strategies.pipeline import Pipeline, Trained
from lightning_bharat.strategies.preparation import Preparation
from lightning_bharat.strategies.schedule import KINDS
from lightning_bharat.strategies.token_weights import TokenWeights

FOLLOWED = 3  # the step, from 0, whose bubble is measured: the first ones prepare what later ones use

if TYPE_CHECKING:
    from lightning_bharat.strategies.hybrid import HybridStrategy


class ScheduledSteps:
    """What a strategy with a pipeline does in its steps.

    Args:
        strategy: connected, with its layout.
        prepared: its module.

    Attributes:
        stages: which of the pipeline's ranks holds what.
    """

    def __init__(self, strategy: HybridStrategy, prepared: Preparation) -> None:
        assert prepared.plan is not None and strategy.pipeline_group is not None
        self.strategy, self.prepared, self.module = strategy, prepared, prepared.module
        if not self.module.automatic_optimization:
            raise MisconfigurationException(
                "automatic_optimization=False: under a pipeline the strategy runs the backward passes; "
                "write pipeline_parallel_size=1"
            )
        options, here = strategy.options, strategy.layout.coordinates(strategy.global_rank)
        self.pipeline = Pipeline(
            self.module,
            prepared.plan,
            strategy.stage_blocks(prepared.plan),
            KINDS[strategy.schedule],
            strategy.pipeline_group,
            strategy.root_device,
            options.num_microbatches,
            options.microbatch_fn,
            seed=torch.initial_seed() + here["data"],
        )
        strategy.choices["pipeline_parallel_size"] = (
            f"{strategy.layout.pipeline}, schedule {strategy.schedule}: blocks "
            + " | ".join(_stage_words(self.pipeline.blocks, prepared.plan.costs))
        )
        rank_of = self.pipeline.rank_of
        holders = {name: sorted({rank_of[i] for i in stages}) for name, stages in prepared.held.items()}
        self.stages = Stages(strategy.pipeline_group, holders, strategy.root_device)
        self._shared = SharedGradients(self.module, self.stages)
        self._fresh: list[tuple[nn.Parameter, Tensor]] = []

    def train(self, step: Callable[..., Any], args: tuple, kwargs: dict[str, Any], tokens: TokenWeights | None) -> Any:
        """The training step on micro-batches, with their backward passes.

        Returns:
            The batch's loss, the same on all ranks of the pipeline.
        """
        batch, *rest = args
        parameters = self.prepared.divided_parameters()
        earlier = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        divided_by = self.module.trainer.accumulate_grad_batches
        scaler = getattr(self.strategy.precision_plugin, "scaler", None)
        scale = scaler.scale if scaler else _same
        done: Trained | None = None

        def run() -> float:
            nonlocal done
            done = self.pipeline.train(lambda part: step(part, *rest, **kwargs), batch, divided_by, scale)
            if tokens is None:
                return done.factor
            return done.factor * tokens.weigh_counted(done.labels, divided_by, earlier, self.strategy.root_device)

        with self._followed():
            self.prepared.scheduled(run)
        assert done is not None
        self._shared.add()
        self._fresh = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient
        return done.loss

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Where a schedule was chosen by what it would take, say what it took, once."""
        pipeline, strategy = self.pipeline, self.strategy
        is_new = strategy.predicted and "measured in step" not in strategy.choices["schedule"]
        if not is_new or pipeline.steps != FOLLOWED or pipeline.clock.spans is not None:
            yield
            return
        pipeline.begin_timeline()
        yield
        timeline = pipeline.end_timeline()
        words = f"measured in step {FOLLOWED}: {took(timeline.seconds, timeline.bubble)}"
        strategy.choices["schedule"] += f"; {words}"
        rank_zero_info(f"schedule {strategy.predicted[0]}, {words}")

    def backward(self, loss: Tensor, optimizer: Any) -> Tensor:
        """Lightning's hooks around the gradients that :meth:`train` has made."""
        strategy, plugin = self.strategy, self.strategy.precision_plugin
        strategy.pre_backward(loss)
        loss = plugin.pre_backward(loss, self.module)
        for parameter, gradient in self._fresh:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._fresh = []
        loss = plugin.post_backward(loss, self.module)
        strategy.post_backward(loss)
        return loss

    def copies(self, parameter: Tensor) -> int:
        """How many ranks of the pipeline hold ``parameter``."""
        return self._shared.holders.get(id(parameter), 1)

    def evaluate(self, step: Callable[..., Any], args: tuple, kwargs: dict[str, Any], share: bool) -> Any:
        """A step of validation, test or prediction. ``share``: all ranks of the pipeline get what it returns."""
        batch, *rest = args

        def run() -> Any:
            return self.pipeline.evaluate(lambda part: step(part, *rest, **kwargs), batch, share)

        return self.prepared.step(run, backward=False)


class SharedGradients:
    """Parameters that several stages hold (a tied embedding and head): each gets the sum of all gradients.

    Attributes:
        holders: id of a parameter -> ranks of the pipeline that hold it, where they are several.
    """

    def __init__(self, module: nn.Module, stages: Stages) -> None:
        mine = {name: on for name, on in stages.holders.items() if len(on) > 1 and stages.rank in on}
        # every pipeline of the mesh makes its groups alike, each among its own ranks
        self._groups: dict[tuple[int, ...], Any] = {
            on: dist.new_group([dist.get_global_rank(stages.group, i) for i in on], use_local_synchronization=True)
            for on in sorted(set(map(tuple, mine.values())))
        }
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self._shared: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for name, on in sorted(mine.items()):
            self._shared.setdefault(tuple(on), []).append(parameters[name])
        self.holders = {id(parameter): len(on) for on, shared in self._shared.items() for parameter in shared}
        self._device = stages.device

    @torch.no_grad()
    def add(self) -> None:
        """Sum the gradients. What no stage has a gradient of has none after it, as on one process. All ranks of the
        pipeline must call it."""
        for on in sorted(self._shared):
            group, shared = self._groups[on], [p for p in self._shared[on] if p.requires_grad]
            reached = torch.tensor([p.grad is not None for p in shared], dtype=torch.uint8, device=self._device)
            dist.all_reduce(reached, dist.ReduceOp.MAX, group=group)
            for parameter in compress(shared, reached.tolist()):
                grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=group)
                parameter.grad = grad


def _stage_words(stages: list[range], costs: Sequence[int]) -> list[str]:
    """The blocks of each stage, and its share of the work where that is known."""
    named = [f"{b.start}-{b.stop - 1}" if len(b) > 1 else str(b.start) for b in stages]
    if not any(costs):
        return named
    ends = [0, *(blocks.stop + 1 for blocks in stages[:-1]), len(costs)]
    shares = [sum(costs[start:end]) / sum(costs) for start, end in pairwise(ends)]
    return [f"{name} ({share:.0%} of the work)" for name, share in zip(named, shares, strict=True)]


def _same(loss: Tensor) -> Tensor:
    return loss
