"""Trials on a real local Ray. Where it is not installed they are skipped: pip install 'lightning-bharat[ray]'."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.distributions import FloatDistribution

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning import SearchSpace, tune
from tests.tuning import tuned

try:
    import ray
except ModuleNotFoundError:
    ray = None

SPACE = SearchSpace({"model.lr": FloatDistribution(1e-3, 0.3, log=True)})
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install 'lightning-bharat[ray]'")
pytestmark = [pytest.mark.timeout(400)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The person's own Ray, which a study uses and leaves alone."""
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()


@pytest.mark.skipif(ray is not None, reason="Ray is installed")
def test_ray_is_asked_for_in_words(here: Path) -> None:
    with pytest.raises(BadInput, match=r"install Ray: pip install 'lightning-bharat\[ray\]'"):
        tune(tuned.parabola, n_trials=1, engine="ray")


def test_an_unknown_engine_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match='engine="rey" is not one of warm, ray. Did you mean "ray"?'):
        tune(tuned.parabola, n_trials=1, engine="rey")


@needs_ray
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_study_is_the_same_on_ray(here: Path, cluster: None, ranks: int) -> None:
    options: dict[str, Any] = {"devices": ranks}
    if ranks == 2:
        hybrid = {"class_path": "lightning_bharat.HybridStrategy", "init_args": {"data_parallel_size": 2}}
        options["strategy"] = hybrid
    path, args = tuned.config(here, **options), [f"--data.data={ranks}"]
    one, other = (
        tune(path, SPACE, n_trials=5, seed=3, pruner=pruner, args=args, study_name=engine, engine=engine)
        for engine in ("warm", "ray")
        for pruner in [{"name": "median", "n_startup_trials": 2}]
    )
    assert {trial.state.name for trial in one.trials} == {"COMPLETE", "PRUNED"}
    for a, b in zip(one.trials, other.trials, strict=True):
        assert (a.params, a.state, a.user_attrs["end"]) == (b.params, b.state, b.user_attrs["end"])
        assert a.values == b.values and a.intermediate_values == b.intermediate_values
        assert a.user_attrs["where"] == b.user_attrs["where"]  # the same machine
    assert ray.is_initialized()


@needs_ray
@pytest.mark.parametrize(
    ("loses", "why"), [(1, "the process that forked it has ended"), (2, "its Ray worker has ended")]
)
def test_a_trial_that_loses_its_worker_is_retried_from_its_checkpoint(
    here: Path, cluster: None, loses: int, why: str
) -> None:
    path = tuned.config(here, enable_checkpointing=True, max_epochs=3)
    model = ["--model=tests.tuning.on_ray.Unlucky", f"--model.loses={loses}"]
    study = tune(path, SPACE, n_trials=1, seed=0, args=model, engine="ray")
    killed, retried = study.trials
    assert killed.state.name == "FAIL"
    assert killed.user_attrs["end"].startswith(f"killed: rank 0: {why}")
    assert killed.user_attrs["where"]["host"] == os.uname().nodename
    assert retried.user_attrs["retry_of"] == 0 and retried.params == killed.params
    assert retried.state.name == "COMPLETE" and retried.user_attrs["steps"] == 2  # behind the fourth
    whole = tune(path, SPACE, n_trials=1, seed=0, study_name="whole")
    assert retried.intermediate_values == pytest.approx(whole.trials[0].intermediate_values, rel=1e-6)


_STUDY = """
from lightning_bharat.tuning import tune
from tests.tuning import on_ray
if __name__ == "__main__":
    tune(on_ray.slow, n_trials=1, study_name="s", engine={"name": "ray", "address": "local"})
"""


@needs_ray
@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGKILL]])
def test_nothing_of_a_ray_that_we_started_outlives_the_study(here: Path, signals: list[signal.Signals]) -> None:
    (here / "study.py").write_text(_STUDY)
    path = os.pathsep.join(sys.path)
    controller = subprocess.Popen(
        [sys.executable, "study.py"], start_new_session=True, env={**os.environ, "PYTHONPATH": path}
    )
    _until(lambda: list(here.glob("rank-*")), 300)
    started = psutil.Process(controller.pid).children(recursive=True)
    (rank,) = here.glob("rank-*")
    assert int(rank.name.split("-")[1]) in [process.pid for process in started]
    for each in signals:
        os.killpg(controller.pid, each)  # as a terminal's Ctrl-C does
        time.sleep(0.5)
    controller.wait(60)
    _until(lambda: not [process for process in started if _lives(process)], 30)
    (trial,) = [trial for trial in _trials(here) if trial.state.name != "WAITING"]
    if signals[0] == signal.SIGINT:
        assert trial.user_attrs["end"] == "killed: the study was interrupted"


def _trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    from lightning_bharat.tuning.storage import open_storage

    return optuna.load_study(study_name="s", storage=open_storage(folder / "runs" / "s")).trials


def _until(found: Callable[[], object], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < limit
        time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
