"""Ten runs of tests/faults/chaos.py; `make chaos` carries out a hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import LAYOUTS, PHASES, Run, carry_out, check, plan

RUNS = plan(40, seed=6)
# Of four ranks, one for each layout: they take long on two cores.
SMALL = [run for run in RUNS if "×" not in run.layout]
CHOSEN = [*SMALL[:8], *(next(run for run in RUNS if run.layout == mixed) for mixed in LAYOUTS if "×" in mixed)]


@pytest.mark.parametrize("run", CHOSEN, ids=str)
def test_a_lost_rank_changes_nothing(run: Run, tmp_path: Path) -> None:
    assert carry_out(run, tmp_path) == 0
    check(run, tmp_path)


def test_the_plan_has_all() -> None:
    assert {run.layout for run in RUNS} == set(LAYOUTS)
    assert {fault.phase for run in RUNS for fault in run.faults} == set(PHASES)
    assert len({(run.layout, run.faults[-1].phase, run.faults[-1].signum) for run in RUNS}) == 40
    assert plan(40, seed=6) == RUNS != plan(40, seed=7)
