"""Who worked when in a step of a pipeline; and what a schedule would leave idle if nobody waited for messages."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bharat.callbacks import PipelineTimeline
from lightning_bharat.strategies.timeline import BACKWARD, FORWARD, INPUT, WEIGHT, Clock, Span, Timeline
from tests.modules import Trained, fit
from tests.ranks import RanksFailed, run_ranks


def gpipe(ranks: int, microbatches: int, seconds: float = 1.0) -> list[Span]:
    """As its picture in a textbook: forward and backward of each stage take ``seconds``."""
    spans = []
    for stage in range(ranks):
        for mb in range(microbatches):
            start = (stage + mb) * seconds
            spans.append(Span(stage, stage, mb, FORWARD, start, start + seconds))
            start = (ranks - 1 + microbatches + ranks - 1 - stage + mb) * seconds
            spans.append(Span(stage, stage, mb, BACKWARD, start, start + seconds))
    return spans


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (1, 3), (4, 1)])
def test_bubble_is_the_textbook_s(ranks: int, microbatches: int) -> None:
    timeline = Timeline(tuple(gpipe(ranks, microbatches)))
    assert (timeline.ranks, timeline.stages, timeline.microbatches) == (ranks, ranks, microbatches)
    expected = (ranks - 1) / (microbatches + ranks - 1)
    assert timeline.bubble == pytest.approx(expected)
    assert timeline.without_waiting == pytest.approx(expected)
    assert timeline.textbook == pytest.approx(expected)


def test_waiting_for_messages_is_told_apart() -> None:
    late = [Span(s.rank, s.stage, s.microbatch, s.kind, s.start * 2, s.start * 2 + 1) for s in gpipe(2, 4)]
    timeline = Timeline(tuple(late))
    assert timeline.without_waiting == pytest.approx(1 / 5)
    assert timeline.bubble > 0.5


def test_backward_of_weights_fills_the_bubble() -> None:
    """Two ranks, one micro-batch, weights apart: the first rank waits for the last one's backward of inputs only."""
    order = [(0, FORWARD, 0), (1, FORWARD, 1), (1, INPUT, 2), (1, WEIGHT, 3), (0, INPUT, 3), (0, WEIGHT, 4)]
    spans = [Span(stage, stage, 0, kind, start, start + 1) for stage, kind, start in order]
    assert Timeline(tuple(spans)).without_waiting == pytest.approx(1 - 6 / 10)


def test_each_step_begins_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(100)
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    clock = Clock(torch.device("cpu"), 0)
    for _ in range(3):
        clock.begin()
        clock.timed(1, 2, FORWARD, lambda: None)
        assert clock.take() == [Span(0, 1, 2, FORWARD, 1.0, 2.0)]


def test_a_trace_without_what_it_needs() -> None:
    with pytest.raises(ValueError, match="made by no other"):
        Timeline((Span(0, 0, 0, BACKWARD, 0.0, 1.0),)).without_waiting  # noqa: B018


def _followed(options: dict[str, Any], folder: str) -> Any:
    follow = PipelineTimeline(folder, step=2)
    fit("deep", {"pipeline_parallel_size": 2, **options}, 4, callbacks=[follow])
    return follow.timeline


@pytest.mark.parametrize(("ranks", "options"), [(2, {}), (4, {}), (2, {"schedule": "ZBVZeroBubble"})])
def test_a_real_step(tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    timelines = run_ranks(_followed, ranks, options, str(tmp_path))
    timeline = timelines[0]
    stages = 2 * (2 if options else 1)
    parts = 8 * 2 // ranks if options else 4  # twice the stages, as far as the rows of a data rank go
    parts = min(parts, 2 * stages)
    kinds = {FORWARD, INPUT, WEIGHT} if options else {FORWARD, BACKWARD}
    done = {(s.stage, s.microbatch, s.kind) for s in timeline.spans}
    assert {(stage, mb, FORWARD) for stage in range(stages) for mb in range(parts)} <= done
    assert kinds <= {s.kind for s in timeline.spans}
    assert all(s.start < s.end for s in timeline.spans)
    assert 0 < timeline.without_waiting < 1 and 0 < timeline.bubble < 1
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert len(events) == len(timeline.spans)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "timeline.html").read_text()


def test_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="PipelineTimeline follows the stages of a pipeline, and there is none"):
        run_ranks(_without, 2, str(tmp_path))


def _without(folder: str) -> None:
    fit(lambda: Trained("deep"), {}, 4, callbacks=[PipelineTimeline(folder)])
