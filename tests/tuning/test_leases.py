"""Trials of a dead controller are found, those of a living one are not, and each point is tried again exactly once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning import tune
from lightning_bharat.tuning.leases import Leases
from lightning_bharat.tuning.process import ProcessId
from lightning_bharat.tuning.retry import copy_reports, mend, retry, successor, tries, withdraw
from lightning_bharat.tuning.samplers import make_sampler
from lightning_bharat.tuning.stopping import why_stop
from lightning_bharat.tuning.storage import open_storage
from tests.tuning import tuned
from tests.tuning.postgres import postgres

__all__ = ["postgres"]
fork = multiprocessing.get_context("fork")
SPACE = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "layers": IntDistribution(1, 8),
    "act": CategoricalDistribution(["relu", None, True, 0.1]),
}


def study_in(where: object, **kwargs: Any) -> optuna.Study:
    return optuna.create_study(storage=open_storage(where), study_name="study", load_if_exists=True, **kwargs)


def last_words(function: Callable, *args: object) -> Any:
    """What ``function(*args, said)`` said in a child that was then killed."""
    said = fork.Queue()
    child = fork.Process(target=function, args=(*args, said))
    child.start()
    words = said.get(timeout=20)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return words


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ask_and_stay(folder: Path, mark: bool, said: Any) -> None:
    study = study_in(folder)
    leases = Leases(study)
    trial = study.ask(SPACE)
    if mark:
        leases.take(trial)
    said.put(trial.params)
    time.sleep(60)


# --- who is dead


@pytest.mark.parametrize("mark", [True, False])
def test_a_killed_controllers_trial_is_found_at_once_on_its_host(tmp_path: Path, mark: bool) -> None:
    last_words(ask_and_stay, tmp_path, mark)
    with Leases(study_in(tmp_path)) as leases:
        assert [trial.number for trial in leases.orphans()] == [0]


def test_a_stopped_controllers_trial_is_its_own(tmp_path: Path) -> None:
    said, clock = fork.Queue(), Clock()
    child = fork.Process(target=ask_and_stay, args=(tmp_path, True, said))
    child.start()
    said.get(timeout=20)
    os.kill(child.pid, signal.SIGSTOP)
    with Leases(study_in(tmp_path), clock=clock) as leases:
        for _ in range(20):
            clock.now += 1000
            assert leases.orphans() == []
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert len(leases.orphans()) == 1


def test_a_trial_that_is_just_asked_for_by_another_controller_gets_time_to_be_marked(tmp_path: Path) -> None:
    study, clock = study_in(tmp_path), Clock()
    with Leases(study, seconds=30), Leases(study_in(tmp_path), clock=clock) as leases:
        study.ask()
        for _ in range(3):
            assert leases.orphans() == []
            clock.now += 10
        assert [trial.number for trial in leases.orphans()] == [0], "its controller lives but does not know of it"


def test_what_a_controller_let_go_is_found_also_by_a_later_one_in_the_same_process(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    with Leases(study) as first:
        first.take(study.ask())
    with Leases(study) as second:
        assert [trial.number for trial in second.orphans()] == [0]
        second.take(study.ask())
        assert len(second.orphans()) == 1


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leases:
    """A controller on another host, with a trial."""
    study, own = study_in(tmp_path), ProcessId.own()
    with monkeypatch.context() as patch:
        patch.setattr(ProcessId, "own", lambda: replace(own, host="far", kernel="another", pid=2**22 + 1))
        leases = Leases(study, seconds=30, clock=Clock())
        leases.take(study.ask())
        yield leases


def test_another_hosts_controller_is_dead_when_its_lease_stands_still(tmp_path: Path, far: Leases) -> None:
    here = Leases(study_in(tmp_path), seconds=5, clock=Clock())  # the other's 30 seconds count, not these 5
    assert here.orphans() == []
    for _ in range(10):
        for clock in (here.clock, far.clock):
            clock.now += 20
        far.renew()
        assert here.orphans() == []
    for _ in range(2):
        here.clock.now += 14
        assert here.orphans() == [], "10 of each 14 seconds count: it may be this host that stood still"
    here.clock.now += 14
    assert len(here.orphans()) == 1


def test_a_pause_of_who_watches_is_no_sign_of_death(tmp_path: Path, far: Leases) -> None:
    here = Leases(study_in(tmp_path), clock=Clock())
    here.orphans()
    here.clock.now += 3600  # both hosts were asleep
    assert here.orphans() == []
    far.clock.now += 3600
    far.renew()
    here.clock.now += 20
    assert here.orphans() == []


def test_a_host_with_nothing_to_do_waits_for_the_others_trials(far: Leases, tmp_path: Path) -> None:
    """And retries them when they are lost: else the last ones would never end, for each start would leave at once."""
    far.seconds = 1.5  # then it is lost; three looks, a second apart, must see it
    far.clock.now += 20
    far.renew()
    lines: list[str] = []
    study = tune(tuned.parabola, n_trials=1, folder=tmp_path, study_name="study", say=lines.append)
    assert [(trial.state.name, trial.user_attrs.get("retry_of")) for trial in study.trials] == [
        ("FAIL", None),
        ("COMPLETE", 0),
    ]
    assert lines[0].startswith("waiting for trials that run elsewhere (1)")


def test_a_lease_is_written_three_times_in_its_span_at_most(tmp_path: Path) -> None:
    leases = Leases(study_in(tmp_path), seconds=30, clock=Clock())
    size = (tmp_path / "study.journal").stat().st_size
    leases.renew()
    leases.clock.now += 9
    leases.renew()
    assert (tmp_path / "study.journal").stat().st_size == size
    leases.clock.now += 2
    leases.renew()
    assert (tmp_path / "study.journal").stat().st_size > size


def test_who_stood_still_too_long_does_not_run_what_is_no_longer_its(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    leases = Leases(study)
    trial = study.ask()
    assert retry(study_in(tmp_path), study.trials[0], "killed")
    assert not leases.take(trial)


def test_a_lease_of_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds=0"):
        Leases(study_in(tmp_path), seconds=0)


# --- the point comes back


def storages(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    if kind == "postgresql":
        return request.getfixturevalue("postgres").empty_database()
    return f"sqlite:///{folder}/s.db" if kind == "sqlite" else str(folder)


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_a_successor_has_the_same_point(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    study = study_in(storages(kind, tmp_path, request))
    trial = study.ask(SPACE)
    trial.suggest_float("only.here", 0, 1)
    for key, value in {"seed": 7, "parent": 3, "config": "trials/0000/config.yaml", "steps": 9}.items():
        trial.set_user_attr(key, value)
    trial.report(0.5, 1)
    assert retry(study, study.trials[0], "killed: rank 1 ended by SIGKILL")
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs["end"] == "killed: rank 1 ended by SIGKILL"
    again = study.ask(SPACE)
    assert again.number == 1
    assert again.params == trial.params and all(type(again.params[key]) is type(trial.params[key]) for key in SPACE)
    assert again.suggest_float("only.here", 0, 1) == trial.params["only.here"]
    assert again.user_attrs == {"seed": 7, "parent": 3, "retry_of": 0}
    assert not study.trials[1].intermediate_values
    study.tell(again, 1.0)
    assert study.best_trial.number == 1


def test_a_point_that_was_enqueued_and_not_suggested_yet_is_not_lost(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.enqueue_trial({"lr": 0.00123, "layers": 5}, user_attrs={"from": "a person"})
    study.ask()
    retry(study, study.trials[0], "killed")
    again = study.ask(SPACE)
    assert (again.params["lr"], again.params["layers"], again.user_attrs["from"]) == (0.00123, 5, "a person")


@pytest.mark.parametrize("suggested", [0, 1, 2])
@pytest.mark.parametrize("killed", [0, 1, 3])
def test_each_point_of_a_grid_has_one_result(tmp_path: Path, suggested: int, killed: int) -> None:
    grid = {"a": IntDistribution(1, 2), "b": IntDistribution(3, 4)}
    sampler = make_sampler("grid", 0, grid)
    study = study_in(tmp_path, sampler=sampler)
    while not why_stop(study, ()):
        trial = study.ask(dict(list(grid.items())[:suggested]) if len(study.trials) == killed else grid)
        if trial.number == killed:
            retry(study, study.trials[killed], "killed")
        else:
            study.tell(trial, trial.params["a"] * 10 + trial.params["b"])
    assert sorted(trial.value for trial in results(study)) == [13, 14, 23, 24]
    assert len(study.trials) == 5


def test_a_point_is_tried_again_max_retries_times(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    for number in range(3):
        study.ask(SPACE)
        assert tries(study, study.trials[number]) == number + 1
        assert retry(study, study.trials[number], "killed", max_retries=2)
    assert mend(study) == 0
    assert len(study.trials) == 3 and len({trial.params["lr"] for trial in study.trials}) == 1
    assert study.trials[2].user_attrs["end"] == "killed; not tried again, as max_retries=2"
    assert "retry_of" not in study.ask().user_attrs


def test_a_trial_with_a_result_is_not_tried_again(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    trial = study.ask()
    seen = study.trials[0]
    study.tell(trial, 1.0)
    assert not retry(study, seen, "killed")
    assert [(trial.state, trial.user_attrs) for trial in study.trials] == [(TrialState.COMPLETE, {})]


def test_reports_up_to_the_checkpoint_are_copied_through_the_pruner(tmp_path: Path) -> None:
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = study_in(tmp_path, pruner=pruner)
    trial = study.ask(SPACE)
    for step in range(6):
        trial.report(float(10 - step), step)
        assert not trial.should_prune()
    old = study.trials[0]
    retry(study, old, "killed")
    again = study.ask(SPACE)
    assert not [key for key in study.trials[1].system_attrs if "rung" in key]
    copy_reports(old, again, up_to_step=3)
    new = study.trials[1]
    assert new.intermediate_values == {0: 10.0, 1: 9.0, 2: 8.0, 3: 7.0}
    rungs = {key: value for key, value in new.system_attrs.items() if "rung" in key}
    assert rungs == {"completed_rung_0": 9.0, "completed_rung_1": 8.0}


# --- a kill between any two writes


class Dying:
    """A storage whose process is killed after so many writes."""

    def __init__(self, storage: Any, writes: int) -> None:
        self._storage, self._left = storage, writes

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if not name.startswith(("set_", "create_")):
            return found

        def write(*args: object, **kwargs: object) -> Any:
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            return found(*args, **kwargs)

        return write


def controller(folder: Path, points: int, writes: int | None = None) -> None:
    """One that does in turn all that ours does; every third trial's ranks are killed once."""
    study = study_in(folder)
    if writes is not None:
        study._storage = Dying(study._storage, writes)
    with Leases(study) as leases:
        while True:
            mend(study)
            for orphan in leases.orphans():
                retry(study, orphan, "killed: its controller has ended", max_retries=100)
            if len(results(study)) >= points:
                return
            trial = study.ask(SPACE)
            if withdraw(study, trial) or not leases.take(trial):
                continue
            trial.report(trial.params["lr"], 1)
            if "retry_of" not in trial.user_attrs and trial.number % 3 == 0:
                retry(study, study.trials[trial.number], "killed: rank 1 ended by SIGKILL", max_retries=100)
                continue
            try:
                study.tell(trial, trial.params["lr"])
            except (UpdateFinishedTrialError, ValueError):
                continue


def results(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def check(study: optuna.Study) -> None:
    """Each suggested point has one result, and each trial that had been killed says so."""
    trials = study.trials
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    points = {trial.number: tuple(trial.params.values()) for trial in trials if len(trial.params) == len(SPACE)}
    done = Counter(points[trial.number] for trial in results(study))
    assert done == Counter(dict.fromkeys(points.values(), 1))
    for trial in trials:
        if trial.state == TrialState.FAIL:
            assert trial.user_attrs["end"].startswith(("killed", "withdrawn"))
        if "retry_of" in trial.user_attrs:
            old = trials[trial.user_attrs["retry_of"]]
            assert old.state == TrialState.FAIL and old.params.items() <= trial.params.items()
    assert study.best_value == min(trial.params["lr"] for trial in results(study))


def test_a_kill_between_any_two_writes_loses_and_doubles_no_point(tmp_path: Path) -> None:
    """Two controllers are killed one after the other, the second while it clears up behind the first."""
    for writes in range(0, 40, 2):
        folder = tmp_path / str(writes)
        codes = []
        for left in (writes, writes % 7):
            child = fork.Process(target=controller, args=(folder, 3, left))
            child.start()
            child.join()
            codes.append(child.exitcode)
        controller(folder, 3)
        check(study_in(folder))
        if codes[0] == 0:
            break
    assert codes[0] == 0 and writes > 25, "every write of a whole study was one to be killed at"


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_of_controllers_that_find_the_same_orphans_one_retries_each(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where = storages(kind, tmp_path, request)
    study = study_in(where)
    for _ in range(4):
        study.ask(SPACE)
    if kind != "journal":
        study._storage._backend.engine.dispose()  # a connection is not shared with a fork
    children = [fork.Process(target=controller, args=(where, 4)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    study = study_in(where)
    while study.get_trials(states=(TrialState.WAITING, TrialState.RUNNING)):  # what the last of them left
        controller(where, len(results(study)) + 1)
    check(study)
    successors = Counter(trial.user_attrs.get("retry_of") for trial in study.trials)
    assert all(successors[number] >= 1 for number in range(4))


def test_of_two_successors_the_first_is_run_and_the_second_withdrawn(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ask(SPACE)
    retry(study, study.trials[0], "killed")
    study.add_trial(successor(study.trials[0]))  # as another that mended at the same time
    first, second = study.ask(SPACE), study.ask(SPACE)
    assert withdraw(study, second) and not withdraw(study, first)
    assert study.trials[2].user_attrs["end"] == "withdrawn: trial 1 already retries trial 0"
    study.tell(first, 1.0)
    assert mend(study) == 0 and len(study.trials) == 3


def test_a_second_successor_whose_controller_is_killed_has_none_of_its_own(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.ask(SPACE)
    retry(study, study.trials[0], "killed")
    study.add_trial(successor(study.trials[0]))
    study.ask(SPACE), study.ask(SPACE)
    assert retry(study, study.trials[2], "killed: its controller has ended")
    assert mend(study) == 0 and len(study.trials) == 3
