"""A study's storage after a kill, a full disk and other processes; databases and servers by URL."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from lightning_bharat.tuning.errors import StorageError
from lightning_bharat.tuning.journal import Journal
from lightning_bharat.tuning.journal_lock import JournalLock
from lightning_bharat.tuning.process import ProcessId
from lightning_bharat.tuning.storage import open_storage

fork = multiprocessing.get_context("fork")


def in_a_child(function: Callable, *args: object) -> multiprocessing.process.BaseProcess:
    child = fork.Process(target=function, args=args)
    child.start()
    return child


def study_in(where: object) -> optuna.Study:
    return optuna.create_study(storage=open_storage(where), study_name="study", load_if_exists=True)


def study_of(where: object) -> optuna.Study:
    """Opened without a record: ``load_if_exists`` writes one."""
    return optuna.load_study(study_name="study", storage=open_storage(where))


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def run(study: optuna.Study, trials: int) -> None:
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))


# --- the journal


def test_a_journal_torn_at_any_byte_of_its_last_record_goes_on(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    run(study, 2)
    study.set_user_attr("note", "ä last record")
    file = tmp_path / "study.journal"
    content = file.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for size in range(start, len(content)):
        file.write_bytes(content[:size])
        study = study_of(tmp_path)
        assert file.read_bytes() == content[:start]
        run(study, 1)
        assert states(study_of(tmp_path)) == ["COMPLETE"] * 3
        file.write_bytes(content)


def test_half_a_record_of_a_killed_writer_does_not_swallow_the_next_of_one_that_runs(tmp_path: Path) -> None:
    study, other = study_in(tmp_path), study_in(tmp_path)
    run(study, 1)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"killed","stu')
    run(other, 1)
    run(study, 1)
    assert states(study) == states(other) == states(study_in(tmp_path)) == ["COMPLETE"] * 3


def test_what_optuna_glued_to_a_torn_record_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "study.journal"
    run(study_in(tmp_path), 1)
    plain = optuna.load_study(study_name="study", storage=JournalStorage(JournalFileBackend(str(file))))
    content = file.read_bytes()
    file.write_bytes(content + content.splitlines()[-1][:30])
    plain.set_user_attr("after", 1)  # which nobody can read, and Optuna does not say so
    assert plain.user_attrs == {}
    for _ in range(2):
        with pytest.raises(json.JSONDecodeError):
            plain.set_user_attr("again", 2)
    torn = file.read_bytes()

    study = study_of(tmp_path)
    assert study.user_attrs == {"after": 1, "again": 2}
    assert (tmp_path / "study.journal.torn-1").read_bytes() == torn
    assert "in line 5 a record was written behind half of another" in caplog.text
    run(study, 1)
    assert states(study_of(tmp_path)) == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"7", b'{"op_code":4,"wor', b"<html>" + b'{"op_code":2,"study_id":0}'])
def test_other_damage_is_refused_and_nothing_is_changed(tmp_path: Path, line: bytes) -> None:
    run(study_in(tmp_path), 2)
    file = tmp_path / "study.journal"
    lines = file.read_bytes().split(b"\n")
    lines[2] = line
    file.write_bytes(b"\n".join(lines))
    before = file.read_bytes()
    with pytest.raises(StorageError, match="line 3 .*head -n 2 study.journal"):
        open_storage(tmp_path)
    assert file.read_bytes() == before


def fill_the_disk(folder: Path, spare: int) -> None:
    study = study_of(folder)
    size = (folder / "study.journal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + spare, size + spare))
    try:
        study.set_user_attr("big", "x" * 1000)
    except StorageError as error:
        assert "record of" in str(error) and "File too large" in str(error)
        os._exit(7)


@pytest.mark.parametrize("spare", [0, 1, 500])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, spare: int) -> None:
    run(study_in(tmp_path), 1)
    before = (tmp_path / "study.journal").read_bytes()
    child = in_a_child(fill_the_disk, tmp_path, spare)
    child.join()
    assert child.exitcode == 7
    assert (tmp_path / "study.journal").read_bytes() == before
    run(study_in(tmp_path), 1)
    assert states(study_in(tmp_path)) == ["COMPLETE"] * 2


def append_many(folder: Path, name: int, count: int) -> None:
    study = study_in(folder)
    for index in range(count):
        study.set_user_attr(f"{name}-{index}", index)


def test_several_processes_append_at_once(tmp_path: Path) -> None:
    study_in(tmp_path)
    children = [in_a_child(append_many, tmp_path, name, 25) for name in range(4)]
    for child in children:
        child.join()
    assert len(study_in(tmp_path).user_attrs) == 100


def append_forever(folder: Path, name: int) -> None:
    append_many(folder, name, sys.maxsize)


def test_writers_that_are_killed_at_any_time_leave_a_journal(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    for name in range(12):
        child = in_a_child(append_forever, tmp_path, name)
        while f"{name}-{name % 4}" not in study.user_attrs:
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        study.set_user_attr("after", name)
    found = study_in(tmp_path).user_attrs
    for name in range(12):  # nothing that was written is lost between two others
        mine = [key for key in found if key.startswith(f"{name}-")]
        assert sorted(int(key.split("-")[1]) for key in mine) == list(range(len(mine)))


# --- its lock


def hold(file: Path, held: object) -> None:
    JournalLock(file).acquire()
    held.set()
    time.sleep(60)


def holder_of(file: Path) -> multiprocessing.process.BaseProcess:
    held = fork.Event()
    child = in_a_child(hold, file, held)
    assert held.wait(20)
    return child


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    child = holder_of(file)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    lock = JournalLock(file, grace=1000)
    assert lock.acquire()
    lock.release()
    assert not lock.path.exists()


def acquire_and_tell(file: Path, order: object, release: bool) -> None:
    lock = JournalLock(file, grace=1000)
    lock.acquire()
    order.put(os.getpid())
    time.sleep(0.05)
    order.put(os.getpid())
    if release:
        lock.release()


def test_of_many_that_wait_for_a_dead_holder_one_at_a_time_gets_the_lock(tmp_path: Path) -> None:
    """Half of them die with it, so every second one takes it from the dead."""
    file, order = tmp_path / "study.journal", fork.Queue()
    child = holder_of(file)
    waiting = [in_a_child(acquire_and_tell, file, order, number % 2 == 0) for number in range(8)]
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    told = [order.get(timeout=20) for _ in range(16)]
    for other in waiting:
        other.join()
    assert told[::2] == told[1::2] and len(set(told)) == 8


def test_a_living_holder_of_this_host_is_waited_for_beyond_the_grace(tmp_path: Path) -> None:
    file, order = tmp_path / "study.journal", fork.Queue()
    child = holder_of(file)
    os.kill(child.pid, signal.SIGSTOP)
    lock = JournalLock(file, grace=0.01)
    waiting = in_a_child(acquire_and_tell, file, order, True)
    lock.grace = 0.01
    time.sleep(0.2)
    assert order.empty()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert order.get(timeout=20) == waiting.pid
    waiting.join()


def test_the_lock_works_on_a_file_system_without_nameless_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        JournalLock, "_create_named", lambda self, token: os.open(tmp_path / "no" / "such", os.O_RDONLY)
    )
    file = tmp_path / "study.journal"
    child = holder_of(file)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    lock = JournalLock(file, grace=1000)
    lock.acquire()
    assert ProcessId.read(json.loads(lock.path.read_text())) == ProcessId.own()
    lock.release()
    assert not lock.path.exists()


@pytest.mark.parametrize("kind", ["elsewhere", "optuna", "nameless"])
def test_a_holder_that_can_not_be_seen_has_the_grace(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "study.journal"
    file.touch()
    lock = JournalLock(file, grace=0.3)
    if kind == "elsewhere":  # its process id is one of a dead process here, which says nothing
        lock.path.write_text(json.dumps({"host": "far", "kernel": "other", "pid": 2**22 + 1, "start": 5, "token": "t"}))
    elif kind == "optuna":
        JournalFileSymlinkLock(str(file)).acquire()
    else:
        lock.path.touch()
    began = time.monotonic()
    lock.acquire()
    assert time.monotonic() - began > 0.3
    lock.release()
    assert not lock.path.is_symlink() and not lock.path.exists()


def test_who_lost_the_lock_does_not_remove_the_next_ones(tmp_path: Path) -> None:
    first, second = JournalLock(tmp_path / "study.journal"), JournalLock(tmp_path / "study.journal")
    first.acquire()
    first.path.unlink()  # as one of another host does after the grace
    second.acquire()
    first.release()
    assert second.path.exists()
    second.release()


def test_optunas_lock_keeps_ours_out_and_ours_keeps_optunas_out(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    study_in(tmp_path)
    plain = JournalStorage(JournalFileBackend(str(file)))
    ours, theirs = study_in(tmp_path), optuna.load_study(study_name="study", storage=plain)
    child = in_a_child(append_many, tmp_path, 0, 25)
    for index in range(25):
        theirs.set_user_attr(f"theirs-{index}", index)
    child.join()
    assert len(ours.user_attrs) == 50


def test_a_process_id_that_was_given_again_is_another_process() -> None:
    own = ProcessId.own()
    assert not own.is_dead()
    assert ProcessId(own.host, own.kernel, own.pid, own.start - 1).is_dead()
    assert not ProcessId(own.host, "another boot", own.pid, own.start - 1).is_dead()
    child = in_a_child(time.sleep, 60)
    other = ProcessId(own.host, own.kernel, child.pid, ProcessId.of(child.pid).start)
    assert not other.is_dead()
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert other.is_dead(), "a zombie runs nothing"
    child.join()
    assert other.is_dead()


# --- what is written where


def test_a_study_is_opened_for_reading_without_a_trace(tmp_path: Path) -> None:
    run(study_in(tmp_path / "a"), 1)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    file = tmp_path / "a" / "study.journal"
    assert states(optuna.load_study(study_name=None, storage=open_storage(file, must_exist=True))) == ["COMPLETE"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before
    for where in (tmp_path / "b", f"sqlite:///{tmp_path}/b.db"):
        with pytest.raises(StorageError, match="no study"):
            open_storage(where, must_exist=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("mysql://me:secret@host/db", r"mysql://me:\*\*\*@host/db.*mysql:// is not known. Write a folder"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("grpc://host", "write grpc://HOST:PORT"),
        ("grpc://host:many", "write grpc://HOST:PORT"),
        ("grpc://:13000", "write grpc://HOST:PORT"),
    ],
)
def test_a_wrong_storage_is_said_in_words(where: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_storage(where)


def test_what_is_no_database_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database, by far" * 50)
    with pytest.raises(StorageError, match="text.db.*file is not a database"):
        open_storage(f"sqlite:///{tmp_path}/text.db")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can't be opened: Not a directory"):
        open_storage(tmp_path / "file" / "study")


def test_journal_in_a_path_of_its_own(tmp_path: Path) -> None:
    assert isinstance(open_storage(tmp_path / "my.journal")._backend, Journal)
    assert (tmp_path / "my.journal").is_file()
