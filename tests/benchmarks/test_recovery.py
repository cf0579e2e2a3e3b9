"""benchmarks/recovery.py counts right, and a run of its two ranks loses one and goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from benchmarks import recovery
from benchmarks.recovery import Restart, goodput, restarts
from tests.cluster.launching import launched_words


def test_restarts_from_what_ranks_wrote() -> None:
    moments = [(0.0, 0, "script"), (1.0, 0, "loaded"), (2.0, 0, "step"), (10.0, 0, "struck")]
    moments += [(13.0, 1, "script")]  # which failed by itself
    moments += [(20.0, 2, "script"), (20.5, 2, "loaded"), (21.0, 2, "step"), (30.0, 2, "struck")]
    moments += [(30.5, 3, "script"), (31.0, 3, "loaded"), (31.5, 3, "step")]
    assert restarts([*moments, (40.0, 3, "struck")], [])[-1] is None
    assert restarts(moments, [30.25]) == [Restart(20.25, 10, 10.5, 11, 2), Restart(0.25, 0.5, 1.0, 1.5, 1)]


def test_goodput_loses_what_is_done_again_and_the_restart() -> None:
    none, interval = goodput(0.0, 0.01)
    assert interval == pytest.approx(2.45, abs=0.05)
    assert none == pytest.approx(1 - interval / 2 / 300 - 0.01 / interval, abs=2e-3)
    assert goodput(30.0, 0.01)[0] == pytest.approx(none * 300 / 330, abs=1e-2)


def test_its_ranks_lose_one_and_go_on(tmp_path: Path) -> None:
    words = ["--nproc-per-node=2", "-m", "benchmarks.recovery", "--as_rank", "ours", str(tmp_path)]
    done = launched_words(tmp_path, *words, str(int(signal.SIGKILL)), "1")
    assert done.code == 0, done.output(0, 1)
    moments = [json.loads(line) for line in (tmp_path / "moments").read_text().splitlines()]
    (found,) = restarts(moments, [])
    assert found is not None and found.tries == 1 and 0 < found.started < found.loaded < found.step
    assert done.events("end")[0]["step"] == recovery.SAVE_EVERY + recovery.LAST
    assert recovery.row("", [found])[-2:] == ["1 of 1", "0"]
