"""benchmarks/memory.py counts real storages, and what the planner says is what is measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import memory
from benchmarks.held import Held, storage_bytes
from lightning_bharat import Layout
from tests.ranks import run_ranks

# The gradients of a block's two norms, summed over tensor ranks, lie in one storage with a flag of four bytes for each.
# So do all nine of a block, summed over context ranks.
FLAGS = {"tensor=2": 2 * 2 * 4, "tensor=2,pipeline=2": 2 * 4, "context=2": 2 * 9 * 4, "pipeline=2,context=2": 9 * 4}


@pytest.mark.parametrize(
    "layout",
    [
        *("data=2", "tensor=2", "data=2,tensor=2", "pipeline=2", "data=2,pipeline=2", "tensor=2,pipeline=2"),
        *("context=2", "pipeline=2,context=2", "data=2,context=2,expert=4", "data=2,pipeline=2,expert=2"),
    ],
)
def test_measured_bytes_are_the_planned_ones(layout: str) -> None:
    measured, said, ddp = run_ranks(memory.cut, Layout.parse(layout).devices, layout, "tiny", timeout=60)[0]
    flags = FLAGS.get(layout, 0)
    expected = [replace(held, activations=0, gradients=held.gradients + flags) for held in said]
    assert [replace(held, activations=0) for held in measured] == expected
    # A micro-batch's token ids are a part of the batch's, which stays whole.
    assert [held.activations for held in measured] == pytest.approx([held.activations for held in said], rel=0.05)
    if layout == "data=2":
        assert ddp == run_ranks(memory.one_process, 1, "tiny")[0]


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_activations_of_several_stages_a_rank(schedule: str) -> None:
    measured, said, _ = run_ranks(memory.cut, 2, "pipeline=2", "large", schedule, timeout=60)[0]
    assert [held.activations for held in measured] == pytest.approx([held.activations for held in said], rel=0.05)


def test_storages_are_counted_whole_and_once() -> None:
    storage = torch.zeros(10)
    assert storage_bytes([storage[:2], storage[3:], torch.zeros(3, dtype=torch.float64)]) == 40 + 24


def test_command_prints_a_table_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--size", "tiny", "--layout", "data=2"]) == 0
    *shown, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert [row.split("  ")[0] for row in shown] == ["layout", *["data=2"] * 6]
    assert found["benchmark"] == "memory"
    assert found["results"][0]["saved"]["parameters"] == 0.5


@pytest.mark.parametrize(
    ("layout", "share", "said", "verdict"),
    [
        ("data=8", 0.19, 100, "met"),
        ("data=8", 0.2, 100, "missed"),
        ("data=4", 0.25, 100, "met"),
        ("data=4", 0.25, 106, "missed"),
    ],
)
def test_verdict(layout: str, share: float, said: int, verdict: str) -> None:
    one, ours = Held(1000, 1000, 2000, 0, 100), Held(1000 // 8, int(1000 * share), 2000 // 8, 500, 100)
    planned = Held(1000 // 8, int(1000 * share), 2000 // 8, 500, said)
    assert memory.Result(layout, "tiny", [ours], [planned], one, one).verdict == verdict
