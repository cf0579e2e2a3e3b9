"""benchmarks/bubble.py runs, and says what it measures. How large a bubble is, is not asserted here."""

from __future__ import annotations

import json

import pytest

from benchmarks.bubble import RANKS, Result, main, measure, missed
from tests.ranks import run_ranks


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "DualPipeV"])
def test_every_schedule_is_followed(schedule: str) -> None:
    result = run_ranks(measure, RANKS, schedule, 0.001, 1)[0]
    assert 0 < result.measured < 1 and 0 < result.expected < 1 and result.step_ms > 0


def test_command_prints_a_table_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--schedule", "1F1B", "--milliseconds", "1", "--steps", "1"])
    *shown, line = capsys.readouterr().out.splitlines()
    assert shown[0].split()[0] == "schedule" and shown[1].startswith("1F1B")
    found = json.loads(line)
    assert found["benchmark"] == "bubble"
    assert code == bool(found["missed"])


def test_goals() -> None:
    good = [Result("1F1B", 0.28, 0.273, 1.0), Result("ZBVZeroBubble", 0.11, 0.105, 1.0)]
    assert not list(missed(good))
    assert list(missed([Result("1F1B", 0.31, 0.273, 1.0)])) == ["1F1B: +13.6% from what was expected"]
    assert list(missed([good[0], Result("DualPipeV", 0.29, 0.28, 1.0)])) == ["DualPipeV: not below 1F1B"]
