"""`bharat report`: any study becomes one page that asks for nothing from a network, and is only read."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from lightning_bharat.cli import main
from lightning_bharat.cluster.warm_job import free_port
from lightning_bharat.reports.study import StudyReport
from lightning_bharat.reports.study_coverage import Coverage
from lightning_bharat.reports.study_resources import Use
from lightning_bharat.reports.study_sections import sections
from lightning_bharat.reports.study_text import as_html, as_markdown

optuna.logging.set_verbosity(optuna.logging.ERROR)
PLANTED = "<script>alert(1)</script>"
BEGIN = datetime(2026, 1, 1, 12)


class Page(HTMLParser):
    """Tags with what they ask for from elsewhere, and the page's text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.asks: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action") and not (value or "").startswith("#"):
                self.asks.append((tag, str(value)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def written(study: optuna.Study) -> tuple[StudyReport, Page, str]:
    """The report of a study, its page and its Markdown; what holds for every study is checked."""
    report = StudyReport.of(study)
    parts = sections(report)
    page = Page(as_html(report.name, parts))
    assert page.asks == []
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1  # plotly.js, once
    drawn = sum(picture.figure is not None for part in parts for picture in part.pictures)
    assert len(page.scripts) == drawn + 2
    for script in page.scripts[:-2]:
        assert json.loads(script)["data"]
    json.dumps(report.as_dict(), allow_nan=False)
    return report, page, as_markdown(report.name, parts)


def told(states: list[TrialState], value: Callable[[int], float] = float, **noted: Any) -> optuna.Study:
    """A study with a trial of each state, a second long, one after another."""
    study = optuna.create_study(study_name="told")
    for i, state in enumerate(states):
        finished = state.is_finished()
        study.add_trial(
            create_trial(
                state=state,
                value=value(i) if state == TrialState.COMPLETE else None,
                params={"model.lr": 10.0 ** -(i % 4 + 1), "model.width": 8 * (i % 3 + 1)},
                distributions={
                    "model.lr": FloatDistribution(1e-5, 1e-1, log=True),
                    "model.width": IntDistribution(8, 24, step=8),
                },
                user_attrs=noted,
            )
        )
        assert finished or state in (TrialState.RUNNING, TrialState.WAITING)
    return study


@pytest.mark.parametrize(
    "states",
    [
        [],
        [TrialState.COMPLETE],
        [TrialState.FAIL] * 4,
        [TrialState.PRUNED] * 4,
        [TrialState.RUNNING, TrialState.WAITING],
    ],
    ids=["none", "one", "all failed", "all pruned", "unfinished"],
)
def test_a_study_of_any_kind_of_trials_has_a_report(states: list[TrialState]) -> None:
    report, page, markdown = written(told(states))
    assert len(report.rows) == len(states)
    assert report.best == ((0,) if states == [TrialState.COMPLETE] else ())
    assert ("none yet" in page.text) == ("none yet" in markdown) == (not report.best)
    assert "it takes complete trials with at least two different finite values" in page.text


def test_values_that_are_not_finite_are_said_and_do_no_harm() -> None:
    values = [math.inf, 3.0, -1.0, math.inf, 2.0, 5.0, 1.0, 0.5]
    study = told([TrialState.COMPLETE] * len(values), lambda i: values[i])
    study.tell(study.ask({"model.lr": FloatDistribution(1e-5, 1e-1, log=True)}).number, math.nan)  # Optuna fails it
    report, page, markdown = written(study)
    assert report.best == (2,) and report.states["fail"] == 1
    assert "trial 2: -1 with model.lr = 0.001" in page.text and "| 0 | complete | inf |" in markdown
    assert [picture.why for part in sections(report) for picture in part.pictures if part.title == "Importance"] == [""]


def test_what_a_person_named_stays_text() -> None:
    study = optuna.create_study(study_name=PLANTED)
    for i in range(4):
        trial = study.ask({PLANTED: CategoricalDistribution(["</script>|x", PLANTED, "`a`"])})
        trial.report(i, 0)
        trial.set_user_attr("end", f"error: ValueError: {PLANTED} | a\nb")
        trial.set_user_attr("data", PLANTED)
        study.tell(trial, i) if i < 3 else study.tell(trial, state=TrialState.FAIL)
    _, page, markdown = written(study)
    assert page.text.count(PLANTED) > 8  # as text: written() saw no script that is not ours
    assert "<script" not in markdown and "&lt;script&gt;" in markdown
    rows = [line.replace("\\|", "") for line in markdown.splitlines() if line.startswith("| ")]
    trials = rows[[row.startswith("| trial | state") for row in rows].index(True) :]
    assert len(trials) == 6 and len({row.count("|") for row in trials}) == 1


def test_other_peoples_attributes_are_not_taken_for_ours() -> None:
    notes = {"end": 3, "seconds": "long", "peak_memory_bytes": [1], "where": "here", "code": 7, "retry_of": True}
    report, _, _ = written(told([TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE], **notes))
    row = report.rows[1]
    assert (row.end, row.cause, row.peak_memory_bytes, row.where, row.code, row.retry_of) == (
        "3",
        "3",
        None,
        None,
        "7",
        None,
    )
    report, _, _ = written(told([TrialState.FAIL], where={"cores": 3, "ranks": "two", "devices": [None]}))
    assert report.use.busy.keys() <= {"trials", "devices"}


def test_failures_are_counted_by_cause_and_infeasible_points_apart() -> None:
    ends = [
        "infeasible: model.width * model.depth <= 4096",
        "infeasible: model.width * model.depth <= 4096",
        "error: ValueError: 3 is not 4",
        "error: ValueError: 5 is not 4",
        "out of memory: 12.0 GiB asked for",
        "killed: rank 1 ended by SIGKILL",
        None,
    ]
    study = optuna.create_study()
    for end in ends:
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"end": end} if end else {}))
    study.add_trial(create_trial(value=1.0))
    report, page, _ = written(study)
    assert report.infeasible_share == 2 / 8 and report.states == {"infeasible": 2, "fail": 5, "complete": 1}
    assert report.causes == {ends[0]: 2, "error: ValueError": 2, "out of memory": 1, "killed": 1, "not said": 1}
    assert "25.0%" in page.text


def test_a_trial_that_broke_a_constraint_is_never_the_best() -> None:
    study = optuna.create_study()
    for value, memory in ((1.0, 5.0), (2.0, -1.0), (3.0, -1.0)):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        trial.set_constraint("memory", memory)
        study.tell(trial, value)
    report, page, _ = written(study)
    assert report.best == (1,) and report.rows[0].violated == ("memory",) and report.violated_share == 1 / 3
    assert "broken constraints" in page.text


def test_several_objectives_have_a_front_and_a_hypervolume() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.set_metric_names(["loss", "speed"])
    for loss, speed in ((1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (math.inf, 9.0)):
        study.tell(study.ask({"x": FloatDistribution(0, 1)}), [loss, speed])
    report, page, markdown = written(study)
    assert report.best == (0, 1, 3)
    # From (3.2, 0.8): 2.2 × 0.2 + 1.2 × 2 beside what both share, and nothing of a value that is not finite
    assert f"It is {2.2 * 0.2 + 1.2 * 2.0:.6g} after all trials" in page.text
    assert "minimize loss, maximize speed" in markdown


def test_a_parameter_of_some_trials_counts_for_these_alone() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        moe = trial.suggest_categorical("moe", [True, False])
        return trial.suggest_float("x", 0, 1) + (trial.suggest_int("experts", 4, 16, step=4) if moe else 0)

    study.optimize(objective, n_trials=24)
    report, page, _ = written(study)
    with_experts = sum("experts" in row.params for row in report.rows)
    assert 0 < with_experts < 24 and report.coverage.single["experts"].trials == with_experts
    assert report.coverage.joint is not None and report.coverage.joint.trials == 24
    assert {"moe", "x", "experts"} <= set(page.text.split())


def test_a_thousand_trials() -> None:
    report, page, _ = written(told([TrialState.COMPLETE] * 1000, lambda i: math.sin(i)))
    assert len(report.rows) == 1000 and page.text.count("model.lr = ") >= 1000


def points(values: list[dict[str, Any]], **distributions: Any) -> Coverage:
    return Coverage.of([(value, distributions) for value in values])


def test_coverage_counts_the_boxes_that_are_hit() -> None:
    sides = {"a": FloatDistribution(0, 1), "b": FloatDistribution(1e-4, 1, log=True)}
    corners = [{"a": a, "b": b} for a in (0.1, 0.9) for b in (1e-4, 1.0)]
    joint = points(corners, **sides).joint
    assert joint is not None and (joint.cells, joint.hit) == (4, 1.0)
    assert joint.random == pytest.approx(1 - 0.75**4)
    joint = points([corners[0]] * 4, **sides).joint
    assert joint is not None and joint.hit == 0.25
    sobol = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=0))
    found = points([sobol.ask(sides).params for _ in range(65)][1:], **sides)  # Optuna draws the first at random
    assert found.joint is not None and found.joint.hit > found.joint.random + 0.1


@pytest.mark.parametrize(
    "side",
    [
        CategoricalDistribution(["a", "b", "c"]),
        IntDistribution(3, 9),
        IntDistribution(1, 64, log=True),
        IntDistribution(4, 16, step=4),
        FloatDistribution(0.0, 1.0, step=0.1),
        FloatDistribution(1e-6, 1.0, log=True),
        IntDistribution(1, 10**9),
        CategoricalDistribution(["alone"]),
    ],
    ids=repr,
)
def test_coverage_expects_what_random_points_do(side: Any) -> None:
    random_sampler = optuna.samplers.RandomSampler(seed=1)
    hits, expected = [], set()
    for _ in range(60):
        study = optuna.create_study(sampler=random_sampler)
        found = points([study.ask({"x": side}).params for _ in range(9)], x=side).joint
        if found is None:
            assert repr(side) == repr(CategoricalDistribution(["alone"]))
            return
        hits.append(found.hit)
        expected.add(found.random)
    assert len(expected) == 1
    assert sum(hits) / len(hits) == pytest.approx(expected.pop(), abs=0.05)


def test_use_adds_up_over_time() -> None:
    def trial(begin: float, until: float, cores: list[int], **more: Any) -> optuna.trial.FrozenTrial:
        found = create_trial(value=0.0, user_attrs={"where": {"host": "h", "cores": cores, "ranks": len(cores)}} | more)
        found.datetime_start, found.datetime_complete = (BEGIN + timedelta(seconds=s) for s in (begin, until))
        return found

    use = Use.of([trial(0, 4, [0]), trial(2, 4, [1]), trial(6, 10, [0, 1]), trial(0, 9, [], end="infeasible: x")])
    assert use.seconds == 10 and use.nothing_ran == 2
    assert use.capacity == {"trials": 2, "ranks": 2, "cores": 2} and use.busy["cores"] == (1, 2, 0, 2, 0)
    assert use.idle("cores") == pytest.approx(1 - (4 + 2 + 8) / 20) and use.idle("devices") is None


def journal(folder: Path, *names: str) -> None:
    folder.mkdir()
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    for name in names:
        study = optuna.create_study(storage=storage, study_name=name)
        study.tell(study.ask({"x": FloatDistribution(0, 1)}), 1.0)


def test_the_command_writes_three_files_beside_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    journal(folder, "width")
    file = folder / "study.journal"
    before = file.read_bytes()
    file.write_bytes(before + b'{"op_code": 5, "torn')  # a writer at work, or one that died
    folder.chmod(0o755)
    assert main(["report", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"study.journal", "report.html", "report.md", "report.json"}
    assert file.read_bytes() == before + b'{"op_code": 5, "torn'
    assert capsys.readouterr().out.split() == [str(folder / f"report.{kind}") for kind in ("html", "md", "json")]
    assert json.loads((folder / "report.json").read_text())["study"] == "width"


def test_a_storage_is_only_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///a%20b.db".replace("%20", " ")
    for name in ("one/../x", "two"):
        study = optuna.create_study(storage=url, study_name=name)
        study.tell(study.ask({"x": FloatDistribution(0, 1)}), 1.0)
    before = (tmp_path / "a b.db").read_bytes()
    assert main(["report", url]) == 2
    assert "write --name with one of: one/../x, two" in capsys.readouterr().err
    assert main(["report", url, "--name", "one/../x"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "a b.db",
        *(f"one_.._x.{kind}" for kind in ("html", "md", "json")),
    }
    assert (tmp_path / "a b.db").read_bytes() == before


@pytest.mark.parametrize("study", ["sqlite:///missing.db", "missing", "empty", "sqlite:///other.db", "words.journal"])
def test_what_is_no_study_is_refused_and_nothing_is_made(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.db").touch()
    (tmp_path / "words.journal").write_text("these are words\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", study]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"bharat report: error: {study}") and message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "other.db").stat().st_size == 0


def test_a_server_that_is_not_there_is_said_without_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"postgresql://me:secret@127.0.0.1:{free_port()}/studies"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("bharat report: error: ") and "127.0.0.1" in message and "secret" not in message


def test_optuna_dashboard_opens_a_study(tmp_path: Path) -> None:
    journal(tmp_path / "study", f"seen-{random.random()}")
    port = free_port()
    dashboard = subprocess.Popen(
        [
            *(sys.executable, "-c", "from optuna_dashboard._cli import main; main()"),
            *("--host", "127.0.0.1", "--port", str(port), str(tmp_path / "study" / "study.journal")),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        found = json.loads(asked(f"http://127.0.0.1:{port}/api/studies", dashboard))
        assert [study["study_name"][:5] for study in found["study_summaries"]] == ["seen-"]
    finally:
        dashboard.kill()
        dashboard.wait()


def asked(url: str, server: subprocess.Popen) -> bytes:
    """What it answers, as soon as it listens."""
    for _ in range(600):
        assert server.poll() is None, "the dashboard ended by itself"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return answer.read()
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the dashboard did not answer within a minute")
