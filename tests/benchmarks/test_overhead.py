"""benchmarks/overhead.py runs, and its loops do the same work. What it measures is not asserted here."""

from __future__ import annotations

import json

import pytest

from benchmarks import overhead
from benchmarks.overhead import LAYOUTS, PEERS, runs
from lightning_bharat import Layout
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("layout", "peer"),
    [(layout, peer) for layout in LAYOUTS for peer in PEERS if runs(Layout.parse(layout), peer)],
)
def test_loops_do_the_same_work(layout: str, peer: str) -> None:
    result = run_ranks(overhead.measure, Layout.parse(layout).devices, layout, peer, "tiny", 6, timeout=100)[0]
    assert result.loss_difference < 1e-5
    assert set(result.step_ms) == {"ours", "peer", "null"}
    assert all(milliseconds > 0 for milliseconds in result.step_ms.values())
    for interval in (result.ratio, result.null):
        assert 0 < interval.low <= interval.median <= interval.high


def test_command_prints_a_table_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code = overhead.main(["--size", "tiny", "--pairs", "6", "--layout", "data=2", "--peer", "hand-written"])
    *shown, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert shown[0].split()[:2] == ["layout", "peer"]
    assert shown[1].startswith("data=2") and "hand-written" in shown[1]
    assert found["benchmark"] == "overhead"
    assert [result["pairs"] for result in found["results"]] == [6]
    assert code == (found["results"][0]["verdict"] != "met")


@pytest.mark.parametrize(
    ("peer", "ratio", "null", "difference", "verdict"),
    [
        ("hand-written", 1.04, 1.0, 0.0, "met"),
        ("hand-written", 1.06, 1.0, 0.0, "missed"),
        ("model-parallel", 1.01, 1.0, 0.0, "met"),
        ("model-parallel", 1.03, 1.0, 0.0, "missed"),
        ("deepspeed-3", 1.01, 1.0, 0.0, "met"),
        ("deepspeed-2", 1.03, 1.0, 0.0, "missed"),
        ("hand-written", 1.04, 1.04, 0.0, "void"),
        ("hand-written", 1.04, 1.0, 0.01, "void"),
        ("hand-written", 1.04, 1.0, float("nan"), "void"),
    ],
)
def test_verdict(peer: str, ratio: float, null: float, difference: float, verdict: str) -> None:
    around = [overhead.Interval(median, median - 0.01, median + 0.01) for median in (ratio, null)]
    assert overhead.Result("", peer, "tiny", 6, "wall", *around, {}, difference).verdict == verdict
