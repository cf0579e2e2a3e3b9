"""SQLite, a real PostgreSQL and a real gRPC server as a study's storage."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bharat.cluster.warm_job import free_port
from lightning_bharat.tuning import storage as storages
from lightning_bharat.tuning.errors import StorageError
from lightning_bharat.tuning.leases import Leases
from lightning_bharat.tuning.retry import retry
from lightning_bharat.tuning.storage import open_storage
from tests.tuning.postgres import Postgres, postgres

__all__ = ["postgres"]


def study_in(where: str) -> optuna.Study:
    return optuna.create_study(storage=open_storage(where), study_name="study", load_if_exists=True)


def run(study: optuna.Study, trials: int) -> None:
    for _ in range(trials):
        trial = study.ask()
        trial.set_user_attr("note", {"a": [1, None]})
        study.tell(trial, trial.suggest_float("x", 0, 1))


@contextmanager
def served(where: str, port: int) -> Iterator[subprocess.Popen]:
    """Optuna's server, as a user starts it."""
    program = "import sys, optuna.storages as s; "
    program += "s.run_grpc_proxy_server(s.get_storage(sys.argv[1]), port=int(sys.argv[2]))"
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, where, str(port)])
    try:
        yield server
    finally:
        server.kill()
        server.wait()


# --- PostgreSQL


def open_at_once(url: str, barrier: object, queue: object) -> None:
    barrier.wait()
    study = study_in(url)
    ended = 0
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            ended += study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    queue.put(ended)


def at_once(url: str, processes: int) -> list[int]:
    fork = multiprocessing.get_context("fork")
    barrier, queue = fork.Barrier(processes), fork.Queue()
    children = [fork.Process(target=open_at_once, args=(url, barrier, queue)) for _ in range(processes)]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    return found


def test_hosts_that_come_at_once_to_an_empty_postgresql_share_one_study(postgres: Postgres) -> None:
    url = postgres.empty_database()
    assert at_once(url, 4) == [0] * 4
    run(study_in(url), 2)
    assert [trial.number for trial in study_in(url).trials] == [0, 1]


def test_a_study_outlives_a_crash_and_restart_of_postgresql(postgres: Postgres) -> None:
    study = study_in(url := postgres.empty_database())
    run(study, 2)
    postgres.stop("immediate")
    try:
        with pytest.raises(StorageError, match=r"bharat@127.*can't be opened: .*refused"):
            open_storage(url)
    finally:
        postgres.start()
    run(study, 1)
    assert [trial.state.name for trial in study_in(url).trials] == ["COMPLETE"] * 3


def test_a_wrong_database_is_said_without_the_password(postgres: Postgres) -> None:
    url = f"postgresql://bharat:secret@127.0.0.1:{postgres.port}/nothing"
    with pytest.raises(StorageError, match=r'bharat:\*\*\*@.*database "nothing" does not exist') as error:
        open_storage(url)
    assert "secret" not in str(error.value)


def test_a_missing_driver_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'psycopg\[binary\]'"):
        open_storage("postgresql://bharat@127.0.0.1/x")
    with pytest.raises(ModuleNotFoundError, match="pip install grpcio protobuf"):
        open_storage("grpc://127.0.0.1:1")


# --- one of several wins


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_of_several_that_end_a_trial_one_does(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").empty_database()
    study = study_in(url)
    for _ in range(4):
        study.ask()
    study._storage._backend.engine.dispose()  # a connection is not shared with a fork
    assert sum(at_once(url, 3)) == 4


# --- gRPC


def test_a_grpc_server_that_is_killed_and_started_again_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "PATIENCE", 60)  # it imports Optuna first
    port, where = free_port(), f"sqlite:///{tmp_path}/s.db"
    with served(where, port) as server:
        study = study_in(f"grpc://127.0.0.1:{port}")
        run(study, 2)
        os.kill(server.pid, signal.SIGKILL)
    with served(where, port):
        open_storage(f"grpc://localhost:{port}").close()
        run(study, 1)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
        with Leases(study) as leases:
            killed = study.ask()
            killed.suggest_float("x", 0, 1)
            assert leases.take(killed) and leases.orphans() == []
            assert retry(study, study.trials[3], "killed")
            again = study.ask()
        assert again.params == killed.params and again.user_attrs == {"retry_of": 3}
    assert [trial.state.name for trial in study_in(where).trials] == ["COMPLETE"] * 3 + ["FAIL", "RUNNING"]


def test_a_grpc_server_that_is_not_there_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "PATIENCE", 1)
    began = time.monotonic()
    with pytest.raises(StorageError, match="no server answers within 1 s"):
        open_storage(f"grpc://127.0.0.1:{free_port()}")
    assert time.monotonic() - began < 10
