"""Studies whose controller or ranks are killed at named points, and what must hold for each of them.

    python -m tests.tuning.kills --kills 60        # as `make chaos`

A killed study is started again by the same call. Then each trial number has one end, each point of the grid one result,
retries say which trial they retry, all values and the best are those of an undisturbed study, and no process is left.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import optuna
import psutil
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.cluster.warm import WarmServer
from lightning_bharat.tuning import SearchSpace, controller, engine, journal, trial_run, tune
from lightning_bharat.tuning.leases import Leases
from lightning_bharat.tuning.storage import open_storage
from tests.ranks import server
from tests.tuning import tuned

RATES = [0.3, 0.1, 0.03, 0.01]
PIDS = "pids"
LIMIT = 60  # seconds for a study


@dataclass(frozen=True)
class Point:
    """Where a process is killed: around a call of ``owner.name``."""

    owner: Any
    name: str
    after: bool = False
    of_rank: bool = False
    after_rank: str = ""  # a rank is killed before, at its first call of this point
    calls: int = len(RATES)  # that there are for certain: one for each trial


POINTS = {
    "after ask": Point(optuna.Study, "ask", after=True),
    "after the trial is taken": Point(Leases, "take", after=True),
    "after its ranks have started": Point(engine.WarmEngine, "start", after=True),
    "after a report": Point(optuna.Trial, "report", after=True),
    "result there, nothing written": Point(controller.Controller, "_book"),
    "attributes written, not told": Point(optuna.Study, "tell"),
    "told": Point(optuna.Study, "tell", after=True),
    "holding the journal's lock": Point(journal.JournalLock, "acquire", after=True),
    "record half written": Point(journal.Journal, "_write"),
    "failed, successor not there": Point(optuna.Study, "add_trial", after_rank="rank in a step"),
    "rank in a checkpoint": Point(pl.Trainer, "save_checkpoint", of_rank=True, calls=2),
    "rank behind a checkpoint": Point(pl.Trainer, "save_checkpoint", after=True, of_rank=True, calls=2),
    "rank in a step": Point(tuned.Tuned, "training_step", of_rank=True),
    "rank before its answer": Point(trial_run, "_values", after=True, of_rank=True),
}

# What happens once in a rank's or a controller's life here.
ONCE = ("failed, successor not there", "rank before its answer")


class ForkServer(WarmServer):
    """Forks from the controller, which has imported everything: a cold process server for each would cost seconds."""

    def __init__(self, preload: Any = ()) -> None:
        self._context = multiprocessing.get_context("fork")  # type: ignore[assignment]

    def warm_up(self) -> None:
        """It is."""


def study_in(folder: Path, url: str = "") -> optuna.Study:
    """The study, as the same call makes it or goes on with it."""
    rates = SearchSpace({"model.lr": CategoricalDistribution(RATES)})
    path = tuned.config(folder, enable_checkpointing=True, max_epochs=2)
    return tune(path, rates, sampler="grid", seed=0, storage=url or None, folder=folder / "run", max_retries=9)


def run(channel: Any, folder: Path, point: str | None, at: int, url: str) -> None:
    """A controller's process; it or a rank of it is killed at the ``at``-th call of ``point``, once."""
    os.chdir(folder)
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    engine.WarmServer = ForkServer  # type: ignore[misc]
    _note_pids(folder / PIDS)
    if point is not None:
        if before := POINTS[point].after_rank:
            _kill_at(POINTS[before], 1, folder / "killed-before")
        _kill_at(POINTS[point], at, folder / "killed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study_in(folder, url)
    os._exit(0)


def _note_pids(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    begin = trial_run._begin

    def noted(orders: Any) -> Any:
        (folder / str(os.getpid())).touch()
        return begin(orders)

    trial_run._begin = noted


def _kill_at(point: Point, at: int, mark: Path) -> None:
    call, calls = getattr(point.owner, point.name), Counter[int]()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[os.getpid()] += 1
        fatal = calls[os.getpid()] == at and not mark.exists()
        if fatal and not point.after:
            _die(mark, point, args)
        result = call(*args, **kwargs)
        if fatal:
            _die(mark, point, args)
        return result

    setattr(point.owner, point.name, wrapped)


def _die(mark: Path, point: Point, args: tuple[Any, ...]) -> None:
    mark.touch()
    if point.name == "_write":  # half of the record is on the disk
        _, file, text, _ = args
        os.write(file, text[: len(text) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def started(folder: Path, point: str | None, at: int, url: str) -> int:
    """The exit code of a controller's process."""
    process, channel = server.fork(run, folder, point, at, url)
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{point}, call {at}: not ended after {LIMIT} s\n{(folder / 'output').read_text()}")
    channel.close()
    return process.exitcode


@cache
def undisturbed() -> dict[float, float]:
    """Values by learning rates."""
    with TemporaryDirectory() as folder:
        assert started(Path(folder), None, 0, "") == 0, (Path(folder) / "output").read_text()
        return {trial.params["model.lr"]: trial.values[0] for trial in _trials(Path(folder), "")}


def check(point: str, at: int, url: str = "") -> list[str]:
    """Kill once and go on; what does not hold, a line each."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        code = started(folder, point, at, url)
        if not (folder / "killed").exists():
            return [f"nothing was killed: there are fewer than {at} calls"]
        if code != (0 if POINTS[point].of_rank else -signal.SIGKILL):
            return [f"the controller ended by {code}", (folder / "output").read_text()]
        wrong = list(_left(folder))
        if code and (code := started(folder, None, 0, url)):
            return [f"the study did not go on: {code}", (folder / "output").read_text()]
        return [*wrong, *_left(folder), *_wrong(_trials(folder, url))]


def _wrong(trials: list[FrozenTrial]) -> list[str]:
    wrong = [f"trial {trial.number} is {trial.state.name}" for trial in trials if not trial.state.is_finished()]
    results = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    values = {trial.params["model.lr"]: trial.values[0] for trial in results}
    if Counter(trial.params["model.lr"] for trial in results) != Counter(RATES):
        wrong.append(f"results of {sorted(trial.params['model.lr'] for trial in results)}, not of each rate once")
    for rate, value in undisturbed().items():
        if abs(values.get(rate, 0.0) / value - 1) > 1e-6:
            wrong.append(f"model.lr={rate}: {values.get(rate)}, and {value} without a kill")
    retried = {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}
    failed = {trial.number for trial in trials if trial.state == TrialState.FAIL}
    if not retried <= failed or any("end" not in trial.user_attrs for trial in trials):
        wrong.append(f"failed {sorted(failed)}, retried {sorted(retried)}: {[t.user_attrs for t in trials]}")
    return wrong


def _left(folder: Path) -> list[str]:
    """Ranks that outlive their controller by seconds."""
    pids = [int(path.name) for path in (folder / PIDS).iterdir()]
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [f"rank {pid} is still there" for pid in alive]


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _trials(folder: Path, url: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="config", storage=open_storage(url or folder / "run")).trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    kills = parser.parse_args().kills
    often = [name for name in POINTS if name not in ONCE]
    rounds = [(often[i % len(often)], i // len(often)) for i in range(kills)]
    plan = [(name, 1) for name in ONCE] + [(name, 1 + number % POINTS[name].calls) for name, number in rounds]
    bad = 0
    for number, (point, at) in enumerate(plan[:kills]):
        began = time.monotonic()
        wrong = check(point, at)
        bad += bool(wrong)
        print(f"{number + 1}: {point}, call {at}: {wrong or 'held'} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{kills - bad} of {kills} kills held")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
