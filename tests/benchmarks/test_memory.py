"""benchmarks/memory.py counts real storages, and the estimate of ``bharat layout`` is what is measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import memory
from lightning_bharat import Layout
from lightning_bharat.plan.memory import Memory
from tests.ranks import run_ranks


@pytest.mark.parametrize("layout", ["data=2", "tensor=2", "data=2,tensor=2"])
def test_measured_bytes_are_the_estimated_ones(layout: str) -> None:
    measured, estimated, ddp = run_ranks(memory.cut, Layout.parse(layout).devices, layout, "tiny", timeout=60)[0]
    assert measured == estimated
    assert ddp == run_ranks(memory.one_process, 1, "tiny")[0]


def test_storages_are_counted_whole_and_once() -> None:
    storage = torch.zeros(10)
    assert memory.storage_bytes([storage[:2], storage[3:], torch.zeros(3, dtype=torch.float64)]) == 40 + 24


def test_command_prints_a_table_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--size", "tiny", "--layout", "data=2"]) == 0
    *shown, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert [row.split("  ")[0] for row in shown] == ["layout", *["data=2"] * 5]
    assert found["benchmark"] == "memory"
    assert found["results"][0]["saved"]["parameters"] == 0.5


@pytest.mark.parametrize(
    ("layout", "share", "verdict"), [("data=8", 0.19, "met"), ("data=8", 0.2, "missed"), ("data=4", 0.25, "")]
)
def test_verdict(layout: str, share: float, verdict: str) -> None:
    one, ours = Memory(1000, 1000, 2000, 0), Memory(1000 // 8, int(1000 * share), 2000 // 8, 500)
    assert memory.Result(layout, "tiny", ours, ours, one, one).verdict == verdict
