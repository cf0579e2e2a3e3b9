"""Work of a pipeline's ranks in a given order, played through: when each piece begins and ends, and what stays idle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "backward of inputs", "backward of weights"


@dataclass(frozen=True)
class Work:
    """A pass of one micro-batch through one stage."""

    stage: int
    microbatch: int
    kind: str


@dataclass(frozen=True)
class Span:
    """One piece of work: seconds since the step began on all ranks."""

    rank: int
    stage: int
    microbatch: int
    kind: str
    start: float
    end: float


# By rank, groups of works in order. What the works of a group have made is sent when the last of them is done.
Order = Mapping[int, Sequence[tuple[Work, ...]]]


def play(order: Order, seconds: Mapping[tuple[int, str], float], transfer: float = 0.0) -> list[Span]:
    """The spans of ``order`` if ranks wait for nothing but what they need.

    Args:
        order: of all ranks.
        seconds: of a pass, by stage and kind.
        transfer: seconds from one rank to another, in which neither works for it.

    Raises:
        ValueError: a work waits for what no other makes.
    """
    ranks = {work.stage: rank for rank, groups in order.items() for group in groups for work in group}
    last = max(ranks)
    left = {rank: list(groups) for rank, groups in order.items()}
    free = dict.fromkeys(order, 0.0)
    ready: dict[tuple[Work, int], float] = {}  # when the result of a work is on a rank
    found: list[Span] = []
    while any(left.values()):
        before = len(found)
        for rank, groups in left.items():
            while groups and all((need, rank) in ready for need in _from_before(groups[0], last)):
                group = groups.pop(0)
                for work in group:
                    start = max([free[rank], *(ready[need, rank] for need in _needs(work, last))])
                    end = free[rank] = ready[_result(work), rank] = start + seconds[work.stage, work.kind]
                    found.append(Span(rank, work.stage, work.microbatch, work.kind, start, end))
                for work in group:
                    for other in {ranks.get(work.stage + 1, rank), ranks.get(work.stage - 1, rank)} - {rank}:
                        ready[_result(work), other] = free[rank] + transfer
        if len(found) == before:
            raise ValueError("there is work whose input was made by no other")
    return found


def bubble(spans: Sequence[Span]) -> float:
    """Share of the time of all ranks, from the first span to the last, that no span fills."""
    ranks = len({span.rank for span in spans})
    whole = ranks * length(spans)
    return 1 - sum(s.end - s.start for s in spans) / whole if whole else 0.0


def length(spans: Sequence[Span]) -> float:
    """Seconds from the first work to the last."""
    return max(s.end for s in spans) - min(s.start for s in spans)


def _result(work: Work) -> Work:
    """What others wait for: a gradient is the same, by itself or together with that of the weights."""
    return Work(work.stage, work.microbatch, BACKWARD) if work.kind == INPUT else work


def _needs(work: Work, last: int) -> Iterator[Work]:
    stage, mb = work.stage, work.microbatch
    if work.kind == FORWARD:
        if stage:
            yield Work(stage - 1, mb, FORWARD)
    elif work.kind == WEIGHT:
        yield Work(stage, mb, BACKWARD)
    else:
        yield Work(stage, mb, FORWARD)
        if stage < last:
            yield Work(stage + 1, mb, BACKWARD)


def _from_before(group: tuple[Work, ...], last: int) -> Iterator[Work]:
    """What must be there before ``group`` begins: all that it needs and does not make itself."""
    made = set[Work]()
    for work in group:
        yield from (need for need in _needs(work, last) if need not in made)
        made.add(_result(work))
