"""What a strategy is asked about the stages of its pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.partition import by_cost, stages_of
from lightning_bharat.strategies.pipeline import Pipeline
from lightning_bharat.strategies.resumes import ResumesRuns
from lightning_bharat.strategies.schedule import KINDS
from lightning_bharat.strategies.timeline import Timeline


class Pipelined(ResumesRuns):
    """Its blocks may be cut over pipeline ranks."""

    schedule: str

    def stage_blocks(self, plan: ModelPlan) -> list[range]:
        """The blocks of each pipeline stage, by their costs; none without a pipeline."""
        if self.layout.pipeline == 1:
            return []
        return by_cost(plan, self.layout.pipeline * KINDS[self.schedule].each)

    def stages_of_rank(self) -> list[int]:
        """Which of them are this rank's."""
        kind, here = KINDS[self.schedule], self.layout.coordinates(self.global_rank)
        return stages_of(here["pipeline"], self.layout.pipeline, kind.each, kind.placement)

    def begin_timeline(self) -> None:
        """Follow the work of all stages in the next training step. All ranks must call it."""
        self._of_pipeline().begin_timeline()

    def end_timeline(self) -> Timeline:
        """What the stages of this rank's pipeline did in that step. All ranks must call it."""
        return self._of_pipeline().end_timeline()

    def plan_to_save(self) -> ModelPlan | None:
        if self._pipeline is None or self.plan is None:
            return self.plan
        return replace(self.plan, costs=self._pipeline.pipeline.measured_costs())

    def _of_pipeline(self) -> Pipeline:
        if self._pipeline is None:
            raise MisconfigurationException(
                f"there are no stages to follow with {self._layout}; write pipeline_parallel_size=2 or more"
            )
        return self._pipeline.pipeline

    def _stages(self) -> tuple[dist.ProcessGroup | None, Callable[[Tensor], int]]:
        """The pipeline's ranks, and on how many of them a parameter is."""
        return (self.pipeline_group, self._pipeline.copies) if self._pipeline else (None, lambda _: 1)
