"""Jobs of a real Slurm that are stopped by the end of their time, and by a signal: all ranks save after the same step,
the job goes back into the queue by itself, and ends there with the losses of an undisturbed run. Needs root and the
Debian or Ubuntu package ``slurm-wlm``; Slurm's daemons run in a folder (tests/slurm.py).

    sudo python -m tests.faults.slurm_jobs

It takes five minutes: Slurm counts a job's time in minutes, and lets one that was put back wait for two.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_bharat import HybridStrategy, events
from lightning_bharat.callbacks import FaultTolerantCheckpoint
from tests.faults.small_run import Steps, fit, steps
from tests.ranks import REPOSITORY
from tests.slurm import is_missing, slurm

STEPS, RANKS, CANT = 60, 2, 77
MINUTES = {"time": 2, "USR1": 10}  # limits of the jobs; LEAST_MARGIN before the end of the first one it is to stop
WHY = {"time": "the end of its time", "USR1": "SIGUSR1"}


def train(folder: Path, seconds: float) -> None:
    """In each task of a job."""
    saves = FaultTolerantCheckpoint(folder / "saved", every_n_train_steps=1000)
    fit(folder, [Steps(folder, seconds), saves], STEPS, strategy=HybridStrategy(), devices=1, num_nodes=RANKS)


def submit(how: str, folder: Path, env: dict[str, str]) -> str:
    """The number of a job whose steps take a second, or a third of one."""
    folder.mkdir()
    seconds = "1" if how == "time" else "0.3"
    words = f"srun {sys.executable} -m tests.faults.slurm_jobs {folder} {seconds}"
    options = [f"--nodes={RANKS}", "--ntasks-per-node=1", f"--time={MINUTES[how]}", "--job-name=train", "--requeue"]
    options += [f"--output={folder}/output", "--open-mode=append", f"--chdir={REPOSITORY}", "--parsable"]
    said = subprocess.run(["sbatch", *options, f"--wrap={words}"], env=env, check=True, capture_output=True, text=True)
    return said.stdout.strip()


def state(job: str, env: dict[str, str]) -> dict[str, str]:
    """What Slurm says of a job."""
    said = subprocess.run(["scontrol", "show", "job", job], env=env, check=True, capture_output=True, text=True)
    return dict(word.partition("=")[::2] for word in said.stdout.split())


def until_completed(jobs: dict[str, str], top: Path, env: dict[str, str]) -> None:
    """Wait for all jobs, and ask the second one to stop.

    Raises:
        AssertionError: a job ended otherwise, or does not end.
    """
    deadline, asked = time.monotonic() + 900, False
    left = dict(jobs)
    while left:
        for how, job in list(left.items()):
            now = state(job, env)
            assert now["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), (now, output(top / how))
            assert time.monotonic() < deadline, (now, output(top / how))
            if now["JobState"] == "COMPLETED":
                assert now["Restarts"] == "1", now
                del left[how]
            if how == "USR1" and not asked and len(steps(top / how)) > 10:
                asked = not subprocess.run(["scancel", "--signal=USR1", job], env=env, check=True).returncode
        time.sleep(1)


def checked(how: str, folder: Path, right: list[float]) -> str:
    """What happened to a job, in words.

    Raises:
        AssertionError: it did not stop, or go on, as it should, or its losses are others.
    """
    done, seen = steps(folder), events.read(folder)
    (stop,) = [event for event in seen if event["kind"] == "stop"]
    assert stop["why"] == WHY[how]
    assert [each.step for each in done] == list(range(1, STEPS + 1)), "no step is lost, and none made twice"
    assert [each.start for each in done] == [int(each.step > stop["step"]) for each in done]
    assert all(abs(each.loss - loss) < 1e-9 for each, loss in zip(done, right, strict=True))
    first, second = (event["time"] for event in seen if event["kind"] == "train_start")
    took = stop["time"] - first
    assert how != "time" or took < 60 * MINUTES[how], took
    words = f"saved after step {stop['step']}, {took:.0f} s after it began to train"
    return f"{words}; {second - stop['time']:.0f} s later it went on by itself, and ended right"


def output(folder: Path) -> str:
    """Of all tasks of a job."""
    return (folder / "output").read_text() if (folder / "output").exists() else ""


def main() -> int:
    """Both jobs; returns 77 where there is no Slurm."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Slurm's daemons must not stay behind
    if why := is_missing():
        print(f"not run: Slurm is not installed ({why})")
        return CANT
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        right = fit(folder, [], STEPS)
        (folder / "slurm").mkdir()
        with slurm(folder / "slurm") as variables:
            env = {**os.environ, **variables, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            env |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}  # no name server knows the nodes
            jobs = {how: submit(how, folder / how, env) for how in WHY}
            until_completed(jobs, folder, env)
        for how in WHY:
            print(f"a job stopped by {how}: {checked(how, folder / how, right)}", flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), float(sys.argv[2]))
    else:
        sys.exit(main())
