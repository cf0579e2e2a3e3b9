"""A picture of one training step of a pipeline: which stage worked when, and on what."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_bharat.figures import save
from lightning_bharat.strategies.hybrid import HybridStrategy
from lightning_bharat.strategies.timeline import BACKWARD, FORWARD, INPUT, WEIGHT, Timeline

COLORS = {FORWARD: "#1f4e79", BACKWARD: "#c9b458", INPUT: "#c9b458", WEIGHT: "#7f9f6f"}


class PipelineTimeline(pl.Callback):
    """Writes ``timeline.png``, ``timeline.html`` and ``timeline.json`` (for ``chrome://tracing`` or Perfetto) of one
    training step, and says how large the bubble was.

    Args:
        dirpath: where to; made if it is not there.
        step: the batch that is followed, from 0. The first ones prepare what later ones use.

    Raises:
        MisconfigurationException: there is no pipeline.
    """

    def __init__(self, dirpath: str | Path = "timeline", step: int = 5) -> None:
        self.dirpath, self.step = Path(dirpath), step
        self.timeline: Timeline | None = None
        self._batches = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, HybridStrategy) or trainer.strategy.layout.pipeline == 1:
            raise MisconfigurationException(
                "PipelineTimeline follows the stages of a pipeline, and there is none; write "
                "HybridStrategy(pipeline_parallel_size=2) or more, or leave the callback out"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._batches == self.step:
            trainer.strategy.begin_timeline()  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._batches == self.step:
            self.timeline = trainer.strategy.end_timeline()  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                write(self.timeline, self.dirpath)
                rank_zero_info(f"{words(self.timeline)}; {self.dirpath / 'timeline.html'}")
        self._batches += 1


def words(timeline: Timeline) -> str:
    """The bubble in a sentence."""
    return (
        f"bubble {timeline.bubble:.1%} of a step of {1e3 * timeline.seconds:.0f} ms; {timeline.without_waiting:.1%} if "
        f"ranks waited for nothing but what they need, {timeline.textbook:.1%} by (p - 1) / (m v + p - 1)"
    )


def write(timeline: Timeline, folder: Path) -> None:
    """The three files."""
    folder.mkdir(parents=True, exist_ok=True)
    svg = save(draw(timeline), folder / "timeline.png")
    page = _PAGE.substitute(words=escape(words(timeline)), svg=svg)
    (folder / "timeline.html").write_text(page, encoding="utf-8")
    (folder / "timeline.json").write_text(json.dumps({"traceEvents": timeline.chrome_trace()}), encoding="utf-8")


def draw(timeline: Timeline) -> Figure:
    """A row for each rank, its first stage on top; numbers are those of the micro-batches."""
    figure = Figure(figsize=(11, 1 + 0.7 * timeline.ranks), layout="constrained")
    axes = figure.subplots()
    stages = {rank: sorted({s.stage for s in timeline.spans if s.rank == rank}) for rank in range(timeline.ranks)}
    for span in timeline.spans:
        start, length = 1e3 * span.start, 1e3 * (span.end - span.start)
        height = 0.8 / len(stages[span.rank])
        bottom = span.rank - 0.4 + height * stages[span.rank].index(span.stage)
        axes.broken_barh([(start, length)], (bottom, height), facecolors=COLORS[span.kind], edgecolor="white", lw=0.5)
        axes.text(
            start + length / 2,
            bottom + height / 2,
            str(span.microbatch),
            ha="center",
            va="center",
            fontsize=6,
            color="white",
            clip_on=True,
        )
    axes.set_yticks(
        range(timeline.ranks),
        [f"rank {rank}: stage {', '.join(map(str, on))}" for rank, on in stages.items()],
    )
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
    kinds = dict.fromkeys(span.kind for span in timeline.spans)
    figure.legend(
        handles=[Patch(color=COLORS[kind], label=kind) for kind in kinds],
        loc="outside upper right",
        ncols=len(kinds),
        frameon=False,
    )
    return figure


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>One step of a pipeline</title>
<style>body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem; } svg { width: 100%; height: auto; }</style>
</head>
<body>
<h1>One step of a pipeline</h1>
<p>$words</p>
$svg
</body>
</html>
""")
