"""Two hosts that share a study's folder, of which one is lost: namespaces of host names and processes of their own.

python -m pytest tests/tuning/two_hosts.py        # as `make chaos`; needs root
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from lightning_bharat.tuning.storage import open_storage
from tests.ranks import REPOSITORY
from tests.tuning import tuned

BHARAT = Path(sys.executable).with_name("bharat")
UNSHARE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
TUNE = "--config=config.yaml --space=space.yaml --n_trials=6 --seed=1 --model.seconds=1.5"


def start(name: str) -> subprocess.Popen:
    """`bharat tune` on a host of that name."""
    command = f"hostname {name} && exec {BHARAT} tune {TUNE}"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    log = Path(f"{name}.log").open("w")  # noqa: SIM115 - the process has it
    return subprocess.Popen([*UNSHARE, "sh", "-c", command], env=env, stdout=log, stderr=log)


@pytest.mark.timeout(400)
@pytest.mark.skipif(subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0, reason="needs unshare")
def test_the_trials_of_a_lost_host_are_retried_by_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the 60 s of its lease, from its checkpoint; though the other has nothing else to do by then."""
    monkeypatch.chdir(tmp_path)
    tuned.config(tmp_path, enable_checkpointing=True)
    Path("space.yaml").write_text("model.lr: {low: 1.0e-4, high: 0.3, log: true}\n")
    one, two = start("one"), start("two")
    lost = _in_its_second_epoch_on("two")
    two.kill()
    assert one.wait(timeout=200) == 0, Path("one.log").read_text()
    trials = optuna.load_study(study_name="config", storage=open_storage(Path("runs/config"))).trials
    assert {trial.user_attrs["where"]["host"] for trial in trials} == {"one", "two"}
    assert trials[lost].user_attrs["end"] == "killed: its controller has ended"
    (retried,) = [trial for trial in trials if trial.user_attrs.get("retry_of") == lost]
    assert retried.params == trials[lost].params and retried.user_attrs["where"]["host"] == "one"
    assert retried.user_attrs["steps"] < 6
    assert sum(trial.state.name == "COMPLETE" for trial in trials) == 6
    assert "waiting for trials that run elsewhere (1)" in Path("one.log").read_text()


def _in_its_second_epoch_on(host: str) -> int:
    """The number of a trial, one of the study's last two."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        time.sleep(0.5)
        for folder in sorted(Path("runs/config/trials").glob("000[45]")):
            study = optuna.load_study(study_name="config", storage=open_storage(Path("runs/config")))
            where = study.trials[int(folder.name)].user_attrs.get("where", {})
            if where.get("host") == host and list(folder.rglob("*.ckpt")):
                return int(folder.name)
    raise AssertionError(f"{Path('one.log').read_text()}\n{Path('two.log').read_text()}")
