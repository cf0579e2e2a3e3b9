"""The process that forks ranks for a Ray actor, and the actor's own side: without Ray, and with it in tests/tuning."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from lightning_bharat.cluster.rank_main import ask
from lightning_bharat.cluster.ray_worker import RayWorker, boot
from lightning_bharat.cluster.warm import call_of
from lightning_bharat.cluster.warm_host import COMMAND, Program


def double(number: int) -> int:
    return ask(number) * 2


def wait() -> None:
    ask("ready")
    time.sleep(60)


def _start(worker: RayWorker, folder: Path, *call: Any) -> list[Any]:
    said = worker.start(pickle.dumps(("start", call_of(*call), 2, {}, folder)))
    return [pickle.loads(words) for words in said]


def test_a_worker_runs_a_job_answers_it_and_says_that_its_process_has_died(tmp_path: Path) -> None:
    program = Program.own(("torch", "lightning_bharat.cluster.rank_main"))
    first = pickle.dumps((program, ()))
    worker = RayWorker(COMMAND, first, first, boot(), os.getcwd(), os.environ.get("PYTHONPATH"))
    try:
        said = _start(worker, tmp_path, double, 3)
        answered = 0
        while said[-1][0] != "end":
            asked = said[answered:]
            answered = len(said)
            answers = pickle.dumps(("answers", [(rank, question + rank) for _, rank, question in asked]))
            said += map(pickle.loads, worker.step(answers))
        assert [outcome.value for outcome in said[-1][1]] == [6, 8]

        _start(worker, tmp_path, wait)
        host = worker._process.pid
        below = psutil.Process(host).children(recursive=True)
        assert len(below) >= 3  # the fork server and two ranks
        os.kill(host, signal.SIGKILL)
        while said := worker.step(pickle.dumps(("answers", []))):  # the other rank's question
            assert pickle.loads(said[0])[0] == "ask"
        assert not psutil.wait_procs(below, 60)[1]
    finally:
        worker.end()
