"""What happened to a run, from its events: attempts, what ended them, the time that was lost, and goodput.

Goodput (MegaScale, Llama 3: "effective training time") is the time of steps that stay in the run, over the time from
its start to its end. A step that is done again after a failure counts once; set-up, saving, looking for a failure,
waiting and loading do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass
class Attempt:
    """From a start to what ended it. Times are in seconds since 1970.

    Attributes:
        number: 0 for the first.
        started: when its ranks were started, or its training began.
        ranks: how many; 0: not known.
        first: when its first step was done; ``None``: there was none.
        begins: the step that it went on from.
        reached: the last step that it is known to have done.
        ended: when it last got on; ``None``: it may still run.
        cause: of its failure, in a word; empty: it did not fail.
        words: how it ended.
        failed: the ranks that failed first.
    """

    number: int
    started: float
    ranks: int = 0
    first: float | None = None
    begins: int = 0
    reached: int = 0
    ended: float | None = None
    cause: str = ""
    words: str = ""
    failed: list[int] = field(default_factory=list)
    kept: int = 0
    lost: float | None = None

    @property
    def seconds_a_step(self) -> float:
        """Mean over its steps; 0 where there are too few to tell."""
        steps = self.reached - self.begins - 1  # the first one's end is the clock's start
        if self.first is None or self.ended is None or steps < 1:
            return 0.0
        return max(self.ended - self.first, 0.0) / steps


@dataclass(frozen=True)
class History:
    """Of a run.

    Attributes:
        events: all of them, in order of time.
        attempts: in order.
    """

    events: list[Event]
    attempts: list[Attempt]

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """From a run's events, as :func:`lightning_bharat.events.read` gives them."""
        every = list(events)
        attempts = _attempts(every)
        _weigh(attempts)
        return cls(every, attempts)

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return float(self.events[-1]["time"] - self.events[0]["time"]) if self.events else 0.0

    @property
    def goodput(self) -> float | None:
        """A share of 1; ``None`` where no step was timed."""
        useful = sum(attempt.kept * attempt.seconds_a_step for attempt in self.attempts)
        return min(useful / self.seconds, 1.0) if useful and self.seconds else None

    @property
    def failures(self) -> Counter[str]:
        """How many of each cause."""
        return Counter(attempt.cause for attempt in self.attempts if attempt.cause)

    @property
    def steps_again(self) -> int:
        """Steps that were done more than once."""
        return sum(a.reached - a.begins - a.kept for a in self.attempts if a.first is not None)

    @property
    def lost(self) -> float:
        """Seconds from where an attempt last got on to where the next one had got as far, over all failures."""
        return sum(attempt.lost or 0.0 for attempt in self.attempts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "seconds": self.seconds,
            "goodput": self.goodput,
            "failures": dict(self.failures),
            "steps_again": self.steps_again,
            "lost_seconds": self.lost,
            "attempts": [vars(attempt) for attempt in self.attempts],
            "events": [dict(event) for event in self.events],
        }


def _attempts(events: Sequence[Event]) -> list[Attempt]:
    launched = any(event["kind"] == "start" for event in events)  # by `bharat launch`, which counts them
    found: list[Attempt] = []
    for event in events:
        kind, at = event["kind"], float(event["time"])
        begins = kind == "start" if launched else kind == "train_start"
        if begins and not (found and kind == "start" and event.get("attempt") == found[-1].number):
            number = event.get("attempt", len(found))
            found.append(Attempt(int(number), at, int(event.get("ranks", 0))))
        if found:
            _take(found[-1], kind, at, event)
    return found


def _take(attempt: Attempt, kind: str, at: float, event: Event) -> None:
    step = event.get("step")
    step = step if isinstance(step, int) and step >= 0 else None
    if kind in ("training", "train_start"):
        # The first says when a step was done; the second when the trainer was ready.
        attempt.first = at if kind == "training" or attempt.first is None else attempt.first
        attempt.begins = step or 0
    attempt.reached = max(attempt.reached, attempt.begins, step or 0)
    if kind == "failure" and not attempt.cause:
        attempt.cause = str(event.get("cause", event.get("fault", "failure")))
        attempt.words = str(event.get("words", event.get("message", "")))
        attempt.failed = list(event.get("ranks", []))
        attempt.ended = min(float(event.get("progress", at)), at)
    elif kind in ("end", "train_end", "stop") and not attempt.cause:
        attempt.words = str(event.get("words", event.get("why", ""))) or attempt.words
        attempt.ended = attempt.ended if kind == "end" and attempt.ended is not None else at


def _weigh(attempts: list[Attempt]) -> None:
    """Which steps stay, and what a failure cost."""
    trained = [attempt for attempt in attempts if attempt.first is not None]
    for attempt, following in zip(trained, [*trained[1:], None], strict=False):
        until = attempt.reached if following is None else min(following.begins, attempt.reached)
        attempt.kept = max(until - attempt.begins, 0)
        if attempt.cause and following is not None and attempt.ended is not None and following.first is not None:
            again = max(attempt.reached - following.begins - 1, 0)  # the first of them is done by then
            pace = following.seconds_a_step or attempt.seconds_a_step
            attempt.lost = following.first - attempt.ended + again * pace
