"""When each stage of a pipeline computed what, in one real step: spans, the bubble between them, a Chrome trace."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

from lightning_bharat.strategies.simulation import BACKWARD, FORWARD, INPUT, WEIGHT, Span, Work, bubble, length, play

LATEST = 64  # passes that costs are the median of


class Clock:
    """Measures one rank's work. While ``spans`` is a list it collects them, and waits for the device at both ends of
    each.

    Args:
        device: that works.
        rank: of the pipeline.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self.device, self.rank = device, rank
        self.spans: list[Span] | None = None
        self._began = 0.0
        self._latest: dict[tuple[int, str], deque[tuple[Any, Any]]] = {}

    def begin(self) -> None:
        """Time is 0 now. To be called after a barrier."""
        self.spans, self._began = [], self._now()

    def take(self) -> list[Span]:
        """The spans since :meth:`begin`; no more are collected."""
        taken, self.spans = self.spans or [], None
        return taken

    def timed(self, stage: int, microbatch: int, kind: str, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``run``."""
        if self.spans is None:
            begin = self._mark()
            out = run(*args, **kwargs)
            self._latest.setdefault((stage, kind), deque(maxlen=LATEST)).append((begin, self._mark()))
            return out
        start = self._now()
        out = run(*args, **kwargs)
        end = self._now()
        self.spans.append(Span(self.rank, stage, microbatch, kind, start - self._began, end - self._began))
        return out

    def costs(self) -> dict[int, float]:
        """Seconds that each stage works on a micro-batch: medians of the latest forward and backward passes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[int, float] = {}
        for (stage, _), marks in self._latest.items():
            found[stage] = found.get(stage, 0.0) + median(_seconds(begin, end) for begin, end in marks)
        return found

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


class TimedStage(PipelineStage):
    """torch's stage, whose work a clock can follow."""

    clock: Clock

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        return self.clock.timed(
            self.stage_index, fwd_chunk_id, FORWARD, super().forward_one_chunk, fwd_chunk_id, *args, **kwargs
        )

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        kind = BACKWARD if full_backward else INPUT
        run, args = super().backward_one_chunk, (bwd_chunk_id, loss, full_backward, last_backward)
        return self.clock.timed(self.stage_index, bwd_chunk_id, kind, run, *args)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        run = super().backward_weight_one_chunk
        return self.clock.timed(self.stage_index, bwd_chunk_id, WEIGHT, run, bwd_chunk_id, *args, **kwargs)


@dataclass(frozen=True)
class Timeline:
    """A step of all ranks of a pipeline."""

    spans: tuple[Span, ...]

    @property
    def microbatches(self) -> int:
        """Parts of the batch."""
        return 1 + max((span.microbatch for span in self.spans), default=-1)

    @property
    def stages(self) -> int:
        """Stages of all ranks."""
        return 1 + max((span.stage for span in self.spans), default=-1)

    @property
    def ranks(self) -> int:
        """Ranks of the pipeline."""
        return 1 + max((span.rank for span in self.spans), default=-1)

    @property
    def seconds(self) -> float:
        """From the first work to the last."""
        return length(self.spans)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time from the first work to the last in which they had none."""
        return bubble(self.spans)

    @property
    def without_waiting(self) -> float:
        """The bubble that is left if work is exchanged in no time: each rank's work in its order, as long as the mean
        of its kind and stage took, begins as soon as what it needs is there."""
        return bubble(simulated(self.spans))

    @property
    def textbook(self) -> float:
        """(p - 1) / (m v + p - 1) for p ranks with v stages of equal cost each and m micro-batches: what GPipe, 1F1B
        (Narayanan et al., 2019) and, with v > 1, interleaved schedules (Narayanan et al., 2021) leave idle."""
        idle = self.ranks - 1
        return idle / (self.microbatches * self.stages / self.ranks + idle)

    def chrome_trace(self) -> list[dict[str, Any]]:
        """Events for ``chrome://tracing`` or Perfetto; times in microseconds."""
        return [
            {
                "name": f"{s.kind} {s.microbatch}",
                "cat": s.kind,
                "ph": "X",
                "pid": s.rank,
                "tid": s.stage,
                "ts": round(s.start * 1e6, 3),
                "dur": round((s.end - s.start) * 1e6, 3),
                "args": {"stage": s.stage, "microbatch": s.microbatch},
            }
            for s in self.spans
        ]


def simulated(spans: Sequence[Span]) -> list[Span]:
    """The same work in the same order on each rank, without waiting for anything but what it needs."""
    order: dict[int, list[tuple[Work, ...]]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        order.setdefault(span.rank, []).append((Work(span.stage, span.microbatch, span.kind),))
    return play(order, _means(spans))


def _means(spans: Sequence[Span]) -> dict[tuple[int, str], float]:
    taken: dict[tuple[int, str], list[float]] = {}
    for span in spans:
        taken.setdefault((span.stage, span.kind), []).append(span.end - span.start)
    return {key: sum(times) / len(times) for key, times in taken.items()}
