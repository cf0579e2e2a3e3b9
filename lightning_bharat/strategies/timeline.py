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

LATEST = 64  # passes that costs are the median of
FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "backward of inputs", "backward of weights"


@dataclass(frozen=True)
class Span:
    """One piece of work: seconds since the step began on all ranks."""

    rank: int
    stage: int
    microbatch: int
    kind: str
    start: float
    end: float


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
        return max(s.end for s in self.spans) - min(s.start for s in self.spans)

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


def bubble(spans: Sequence[Span]) -> float:
    """Share of the time of all ranks, from the first span to the last, that no span fills."""
    ranks = len({span.rank for span in spans})
    whole = ranks * (max(s.end for s in spans) - min(s.start for s in spans))
    return 1 - sum(s.end - s.start for s in spans) / whole if whole else 0.0


def simulated(spans: Sequence[Span]) -> list[Span]:
    """The same work in the same order on each rank, without waiting for anything but what it needs."""
    last = max(span.stage for span in spans)
    means = _means(spans)
    waiting = {rank: sorted((s for s in spans if s.rank == rank), key=lambda s: s.start) for rank in _ranks(spans)}
    free = dict.fromkeys(waiting, 0.0)
    done: dict[tuple[int, int, str], float] = {}
    found: list[Span] = []
    while any(waiting.values()):
        before = len(found)
        for rank, queue in waiting.items():
            while queue and all(need in done for need in _needs(queue[0], last)):
                span = queue.pop(0)
                start = max([free[rank], *(done[need] for need in _needs(span, last))])
                end = start + means[span.stage, span.kind]
                free[rank] = done[span.stage, span.microbatch, _phase(span.kind)] = end
                found.append(Span(rank, span.stage, span.microbatch, span.kind, start, end))
        if len(found) == before:
            raise ValueError("the timeline has work whose input was made by no other")
    return found


def _ranks(spans: Sequence[Span]) -> list[int]:
    return sorted({span.rank for span in spans})


def _means(spans: Sequence[Span]) -> dict[tuple[int, str], float]:
    taken: dict[tuple[int, str], list[float]] = {}
    for span in spans:
        taken.setdefault((span.stage, span.kind), []).append(span.end - span.start)
    return {key: sum(times) / len(times) for key, times in taken.items()}


def _phase(kind: str) -> str:
    return "backward" if kind in (BACKWARD, INPUT) else kind


def _needs(span: Span, last: int) -> list[tuple[int, int, str]]:
    """What must be done before: by stage, micro-batch and phase."""
    stage, mb = span.stage, span.microbatch
    if span.kind == FORWARD:
        return [(stage - 1, mb, FORWARD)] if stage else []
    if span.kind == WEIGHT:
        return [(stage, mb, "backward")]
    return [(stage, mb, FORWARD)] + ([(stage + 1, mb, "backward")] if stage < last else [])
