"""The events of a run: whole lines from many processes, and a torn one costs itself alone."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_bharat import events


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    children = []
    for rank in range(4):
        if (child := os.fork()) == 0:
            for step in range(100):
                events.append(tmp_path, "save", rank=rank, step=step, why="x" * 500)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    found = events.read(tmp_path)
    for rank in range(4):
        assert [event["step"] for event in found if event["rank"] == rank] == list(range(100))


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    events.append(tmp_path, "start", step=0)
    with (tmp_path / events.EVENTS).open("a") as file:
        file.write('{"time": 1, "kind": "sa\n[1]\n{"kind": "timeless"}\n')
    events.append(tmp_path, "end", step=1)
    assert [event["kind"] for event in events.read(tmp_path)] == ["start", "end"]


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    assert events.read(tmp_path) == []
