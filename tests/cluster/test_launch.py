"""``bharat launch``: scripts as Python runs them, failures told apart and survived or not, ranks that stop or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from lightning_bharat.commands import launch
from tests.cluster.launching import launched, launched_words
from tests.ranks import REPOSITORY

STEP = "from lightning_bharat.cluster.heartbeat import progress\n"


def test_a_script_runs_as_main(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("ANSWER = 42")
    text = """
    import multiprocessing, os, pickle, sys
    import beside

    class Mine: ...

    def double(x):
        return 2 * x

    if __name__ == "__main__":
        pickle.loads(pickle.dumps(Mine()))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            doubled = pool.map(double, [beside.ANSWER])
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        print(sys.argv[1:], [os.environ[name] for name in names], doubled, os.getcwd())
        import atexit
        atexit.register(print, "last words")
    """
    done = launched(tmp_path, text, ranks=2, words=("a", "--b=c"))
    assert done.code == 0
    assert done.output(1) == f"['a', '--b=c'] ['1', '1', '2', '0'] [84] {os.getcwd()}\nlast words\n"
    assert [event["ranks"] for event in done.events("start")] == [2]
    assert [event["ok"] for event in done.events("end")] == [True]


def test_modules_and_our_own_command(tmp_path: Path) -> None:
    done = launched_words(tmp_path, "--nproc-per-node=1", "-m", "calendar", "2026", "11")
    assert done.code == 0 and "November 2026" in done.output()
    done = launched_words(tmp_path / "own", "--nproc-per-node=1", "--", "bharat", "checkpoint", "--help")
    assert done.code == 0 and "usage: bharat checkpoint COMMAND" in done.output()


def test_the_same_exception_twice_is_the_program_s(tmp_path: Path) -> None:
    text = f"""
    {STEP}
    import os
    progress("step", 7)
    raise KeyError(f"no column {{os.getpid()}}")
    """
    done = launched(tmp_path, text)
    assert done.code == 1
    assert [(event["cause"], event["step"]) for event in done.events("failure")] == [("exception", 7)] * 2
    assert "the same exception twice at step 7" in done.events("end")[0]["words"]
    assert "KeyError" in done.output(attempt=1)
    assert "KeyError" in Path(done.events("failure")[0]["report"]).read_text()


def test_a_rank_that_ends_in_a_thread_has_last_words(tmp_path: Path) -> None:
    """HealthMonitor's threads end a process whose main thread hangs; the words may name a host to leave out."""
    text = """
    import os
    from lightning_bharat.cluster import last_words
    last_words.say("HealthError", "leave out some-host and restart: hang: no progress")
    os._exit(75)
    """
    done = launched(tmp_path, text, "--max-restarts", "0")
    (failure,) = done.events("failure")
    assert failure["cause"] == "health" and "raised HealthError: leave out some-host" in failure["words"]


def test_an_exception_at_another_step_is_tried_again(tmp_path: Path) -> None:
    text = f"""
    {STEP}
    import os
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    progress("step", 5 + attempt)
    if attempt < 3:
        raise OSError("the network file system went away")
    """
    done = launched(tmp_path, text)
    assert done.code == 0
    assert len(done.events("failure")) == 3
    assert [event["wait"] for event in done.events("restart")] == [0, 0, 0], "each restart had got on"


def test_restarts_that_bring_nothing_end(tmp_path: Path) -> None:
    done = launched(tmp_path, "import os; os.kill(os.getpid(), 9)", "--max-restarts", "1")
    assert done.code == 1
    assert [event["cause"] for event in done.events("failure")] == ["signal"] * 2
    assert "1 restarts in a row brought no new step" in done.events("end")[0]["words"]
    (tmp_path / "none").mkdir()
    again = launched(tmp_path / "none", "raise SystemExit(3)", "--max-restarts", "0")
    assert again.code == 1 and len(again.events("start")) == 1
    assert "rank 0 left with exit code 3" in again.events("failure")[0]["words"]


def test_each_attempt_meets_apart(tmp_path: Path) -> None:
    """With torchelastic's own store half of such restarts fail."""
    text = f"""
    {STEP}
    import os
    import torch, torch.distributed as dist
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    print("met", int(total))
    progress("step", attempt + 1)
    if attempt < 4:
        if dist.get_rank() == attempt % 2:
            os.kill(os.getpid(), 9)
        dist.all_reduce(total)
    """
    done = launched(tmp_path, text, ranks=2)
    assert done.code == 0
    assert [event["ranks"] for event in done.events("failure")] == [[0], [1], [0], [1]]
    for attempt in range(5):
        assert "met 2" in done.output(1, attempt), attempt


def test_a_stopped_rank_is_found_without_any_callback(tmp_path: Path) -> None:
    text = """
    import os, signal, time
    def stands_here():
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(100)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "1":
            stands_here()
        time.sleep(100)
    """
    done = launched(tmp_path, text, "--limits", "stopped=0.5", ranks=2)
    assert done.code == 0
    (failure,) = done.events("failure")
    assert (failure["cause"], failure["ranks"]) == ("stopped", [1])
    report = Path(failure["report"]).read_text()
    assert "process state T" in report and "in stands_here" in report.partition("stacks of rank 1")[2]


def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    text = f"""
    {STEP}
    import os, time
    import torch.distributed as dist
    dist.init_process_group("gloo")
    progress("step", 3)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if dist.get_rank() == 1:
            time.sleep(100)
        dist.barrier()
    progress("script")
    time.sleep(1.5)  # longer than a step may take, when none runs
    """
    done = launched(tmp_path, text, "--limits", "step=1", ranks=2)
    assert done.code == 0
    (failure,) = done.events("failure")
    assert (failure["cause"], failure["ranks"], failure["step"]) == ("hung", [1], 3)
    assert "rank 1 did not get on for" in failure["words"] and "'step'" in failure["words"]


def test_a_rank_that_works_without_a_sign_of_life_is_left_alone(tmp_path: Path) -> None:
    """One that holds Python's lock in C can't beat. It uses time."""
    text = """
    import time
    began = time.monotonic()
    while time.monotonic() - began < 2:
        sum(range(30_000_000))
    """
    done = launched(tmp_path, text, "--limits", "stopped=0.3")
    assert done.code == 0 and not done.events("failure")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.py"], "missing.py is no file"),
        (["--no-python", "train.py"], "--no-python can't be done"),
        (["--limits", "steps=3", __file__], "--limits steps=3: write seconds for some of stopped, setup, step"),
        (["--limits", "step=soon", __file__], "--limits step=soon"),
        (["--nproc-per-node", "few", __file__], "few"),
        (["--max-restart=x", __file__], "max-restart"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(words) == 2
    assert said in capsys.readouterr().err


WAITS = """
    import os, signal, sys, time
    from pathlib import Path
    def save(*_):
        Path(sys.argv[1], "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    print("pid of this rank:", os.getpid(), flush=True)
    Path(sys.argv[1], "pid").write_text(str(os.getpid()))
    time.sleep(1000)
    """


def test_sigterm_reaches_the_ranks_which_may_save(tmp_path: Path) -> None:
    def send() -> None:
        _pid(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    done = launched(tmp_path, WAITS, words=(str(tmp_path),))
    thread.join()
    assert done.code == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()
    assert not Path(f"/proc/{_pid(tmp_path)}").exists()
    assert [event["words"] for event in done.events("end")] == ["the launcher got SIGTERM"]


def test_no_rank_stays_behind_a_killed_launcher(tmp_path: Path) -> None:
    """Real processes, from the command line."""
    (tmp_path / "script.py").write_text(dedent(WAITS))
    words = [sys.executable, "-m", "lightning_bharat.cli", "launch", "--tee=3", f"--log-dir={tmp_path}"]
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(
            [*words, str(tmp_path / "script.py"), str(tmp_path)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        pid = _pid(tmp_path)
        _until(lambda: f"[default0]:pid of this rank: {pid}" in (tmp_path / "output").read_text())
    finally:
        launcher.kill()
        launcher.wait()
    _until(lambda: not Path(f"/proc/{pid}").exists())
    assert not (tmp_path / "saved").exists()


def _pid(folder: Path) -> int:
    path = folder / "pid"
    _until(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def _until(there: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)
