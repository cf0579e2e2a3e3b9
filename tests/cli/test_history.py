"""``bharat checkpoint history``: of a real run that lost a rank, and the arithmetic of what was lost."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_bharat.cli import main
from lightning_bharat.reports.history import History
from tests.cluster.launching import launched

RUN = """
import os, time
from lightning_bharat.cluster.heartbeat import progress
from lightning_bharat.events import append
from pathlib import Path

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
for step in range(4 * attempt, 8):
    progress("step", step)
    time.sleep(0.02)
    if step % 2:
        append(Path({folder!r}), "save", step=step, stall=0.01)
    if (step, attempt) == (6, 0):
        os.kill(os.getpid(), 9)
"""


class Texts(HTMLParser):
    """All text of a page, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_a_run_that_lost_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launched(tmp_path, RUN.format(folder=str(tmp_path))).code == 0
    capsys.readouterr()
    assert main(["checkpoint", "history", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    kinds = [line.split()[2] for line in text.splitlines() if line.startswith("20")]
    expected = ["start", "training", "failure", "restart", "start", "training", "end"]
    assert [kind for kind in kinds if kind != "save"] == expected
    assert "signal: rank 0 was ended by SIGKILL" in text and "after step 6" in text
    assert "× step" in text, "saves in a row are told together"
    assert "failures: 1 (1 × signal)" in text and "2 steps done again" in text
    assert main(["checkpoint", "history", str(tmp_path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(a["begins"], a["reached"], a["kept"], a["cause"]) for a in found["attempts"]] == [
        (0, 6, 4, "signal"),
        (4, 7, 3, ""),
    ]
    assert 0 < found["goodput"] < 1 and found["lost_seconds"] > 0
    assert main(["checkpoint", "history", str(tmp_path), "--format", "html"]) == 0
    page = Texts()
    page.feed(capsys.readouterr().out)
    assert page.loads == [] and any("ended by SIGKILL" in words for words in page.texts)


def event(time: float, kind: str, **facts: Any) -> dict[str, Any]:
    return {"time": time, "host": "a", "kind": kind, **facts}


def test_what_is_lost_and_goodput() -> None:
    """A step takes a second. The first attempt does 101, of which 90 were saved."""
    history = History.of(
        [
            event(0, "start", attempt=0, ranks=2),
            event(10, "training", attempt=0, step=0),
            event(113, "failure", attempt=0, cause="stopped", words="…", step=101, progress=110, ranks=[1]),
            event(113, "restart", attempt=0),
            event(113.5, "start", attempt=1, ranks=2),
            event(114, "training", attempt=1, step=90),
            event(224, "end", attempt=1, ok=True, step=201),
        ]
    )
    first, second = history.attempts
    assert (first.seconds_a_step, second.seconds_a_step) == (1, 1)
    assert (first.kept, second.kept, history.steps_again) == (90, 111, 11)
    assert history.lost == first.lost == 4 + 10, "until it trains again, and ten more steps to be as far"
    assert history.goodput == 201 / 224
    assert history.failures == {"stopped": 1}


def test_events_of_a_run_without_a_launcher() -> None:
    """As FaultTolerantCheckpoint alone writes them."""
    history = History.of(
        [
            event(0, "train_start", step=0),
            event(50, "save", step=50),
            event(90, "train_start", step=50),
            event(140, "save_failed", step=100, error="disk full"),
            event(150, "train_end", step=110),
        ]
    )
    assert [(a.begins, a.reached, a.ended) for a in history.attempts] == [(0, 50, None), (50, 110, 150)]
    assert History.of([]).goodput is None


def test_a_folder_without_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "history", str(tmp_path)]) == 2
    assert "has no events.jsonl; write the folder of a run" in capsys.readouterr().err
