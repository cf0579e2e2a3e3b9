"""What the ranks of ``bharat layout --timeline`` do: a few steps of a project's module in a pipeline."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_bharat.callbacks.pipeline_timeline import PipelineTimeline, words
from lightning_bharat.commands.inspection import QUIET, InspectionCLI, quiet
from lightning_bharat.commands.sized_strategy import sized_strategy
from lightning_bharat.plan.layout import Layout

STEP = 3  # the first ones make buffers and shapes known
KEPT = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def run_step(cli: InspectionCLI, layout: Layout, folder: str) -> str:
    """Write the timeline of one step; its bubble in words."""
    quiet()
    module, datamodule = cli.build()
    follow = PipelineTimeline(folder, STEP)
    trainer = pl.Trainer(
        strategy=sized_strategy(cli, layout),
        accelerator="cpu",
        devices=layout.devices,
        max_steps=STEP + 1,
        limit_val_batches=0,
        callbacks=[follow],
        **QUIET,
        **cli.trainer_settings(*KEPT),
    )
    trainer.fit(module, datamodule=datamodule)
    if follow.timeline is None:
        raise ValueError(f"the training data have fewer than {STEP + 1} batches for each data rank")
    return words(follow.timeline)
