"""benchmarks/checkpoint.py runs. What it measures is not asserted here."""

from __future__ import annotations

import json

import pytest

from benchmarks import checkpoint
from benchmarks.checkpoint import GOALS


def test_command_prints_a_table_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code = checkpoint.main(["--size", "tiny", "--rounds", "6"])
    *shown, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert shown[0] == "0.000 GB on 2 ranks, 6 rounds"
    assert found["benchmark"] == "checkpoint" and set(GOALS) <= found["result"]["ratios"].keys()
    assert all(seconds > 0 for name, seconds in found["result"]["seconds"].items() if name != "beside wait")
    assert code == any(" missed" in row for row in shown)
