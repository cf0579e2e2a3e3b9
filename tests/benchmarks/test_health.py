"""benchmarks/health.py runs. What it measures is not asserted here, but for detectors that are quiet."""

from __future__ import annotations

import json

import pytest

from benchmarks import health
from benchmarks.health_cost import Cost
from benchmarks.paired import Interval


def test_command_prints_tables_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--part", "cost", "--layout", "data=1", "--pairs", "6", "--part", "noise", "--seeds", "1"]
    health.main([*words, "--steps", "1000", "--part", "faults", "--fault", "weights that are too large"])
    *shown, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["benchmark"] == "health" and shown[0].split()[:2] == ["layout", "step"]
    (cost,) = found["cost"]
    assert cost["pairs"] == 6 and cost["step_ms"] > 0 and cost["own_ms"] > 0
    assert all(len(alarms) == 1 for alarms in found["noise"].values())
    assert found["faults"]["weights that are too large"]["seconds"] > 0


@pytest.mark.parametrize(("own", "verdict"), [(0.2, "met"), (0.3, "missed")])
def test_verdict(own: float, verdict: str) -> None:
    one = Interval(1, 1, 1)
    assert Cost("data=1", 6, 50, own, own, 50, 0.01, one, one).verdict == verdict
