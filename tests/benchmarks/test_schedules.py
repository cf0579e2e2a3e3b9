"""benchmarks/schedules.py runs, and says what it measures. How good a choice is, is not asserted here."""

from __future__ import annotations

import pytest

from benchmarks.bubble import RANKS
from benchmarks.schedules import Case, Result, Run, run
from lightning_bharat.strategies.schedule import KINDS
from tests.ranks import run_ranks


def test_the_chosen_one_is_followed() -> None:
    chosen = run_ranks(run, RANKS, "auto", Case(1, 1, 1, 4), 1)[0]
    assert chosen.schedule in KINDS and chosen.schedule == next(iter(chosen.predicted))
    assert {*chosen.predicted} == {*KINDS} - {"DualPipeV"}  # which takes no 4 micro-batches on 4 ranks
    assert chosen.seconds > 0 and all(seconds >= 0.027 for seconds, _ in chosen.predicted.values())


def test_how_far_it_is_behind() -> None:
    predicted = {"1F1B": (1.0, 0.2), "GPipe": (1.1, 0.3)}
    fixed = (Run("1F1B", 1.2, 0.25, {}), Run("GPipe", 1.0, 0.3, {}))
    result = Result(Case(1, 2, 3, 8), Run("1F1B", 1.21, 0.25, predicted), fixed)
    assert result.behind == pytest.approx(0.2)
    first, head, best, *_, last = str(result).splitlines()
    assert first == "forward / inputs / weights 1 / 2 / 3 ms, 8 micro-batches"
    assert head.startswith("schedule") and best.startswith("GPipe") and "+20.0% from the fastest" in last
