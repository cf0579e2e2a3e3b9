"""One of two hosts is lost, by a kill of all its processes or a cut of its link; the other one finds it, names it, and
goes on alone. Needs root: the hosts are network namespaces.

    sudo python -m tests.faults.two_hosts

On two busy cores it took 13 to 16 s from the kill, and 16 to 28 s from the cut, to the next step: ten seconds of
silence for a cut, then until the rendezvous has given the other host up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
from lightning.pytorch.callbacks import Callback

from benchmarks.slow_link import ADDRESSES, DEVICE, NAMES, NoHosts, SlowLink, on_host
from lightning_bharat import HybridStrategy, events
from lightning_bharat.callbacks import FaultTolerantCheckpoint
from tests.ranks import REPOSITORY
from tests.strategies.test_resume import Gpt

STEPS, LOST_AFTER = 80, 12
WORDS = {"kill": "rank 1 (data 1) is gone", "cut": "host 1"}


class Steps(Callback):
    """Rank 0 writes when each step was done, on how many ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.is_global_zero:
            with (self.folder / "steps").open("a") as file:
                file.write(json.dumps([time.monotonic(), trainer.global_step, trainer.world_size]) + "\n")
        time.sleep(0.1)


def train(folder: Path) -> None:
    """On each rank."""
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        strategy=HybridStrategy(),
        accelerator="cpu",
        precision="64-true",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        max_steps=STEPS,
        default_root_dir=folder,
        callbacks=[Steps(folder), FaultTolerantCheckpoint(folder / "saved", every_n_train_steps=5, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Gpt(), ckpt_path="last")


def steps(folder: Path) -> list[tuple[float, int, int]]:
    """What rank 0 has written."""
    path = folder / "steps"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launcher(host: int, folder: Path) -> subprocess.Popen:
    """``bharat launch`` on a host."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": DEVICE, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = ["--nnodes=1:2", f"--node-rank={host}", f"--master-addr={ADDRESSES[0]}", f"--local-addr={ADDRESSES[host]}"]
    words += ["--nproc-per-node=1", "-m", "tests.faults.two_hosts", str(folder)]
    words = on_host(host, sys.executable, "-m", "lightning_bharat.cli", "launch", *words)
    with (folder / f"output{host}").open("w") as output:
        return subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)


def lose(how: str) -> None:
    """Host 1."""
    if how == "cut":
        subprocess.run(["ip", "-n", NAMES[1], "link", "set", DEVICE, "down"], check=True)
        return
    found = subprocess.run(["ip", "netns", "pids", NAMES[1]], check=True, capture_output=True, text=True).stdout
    for pid in found.split():
        os.kill(int(pid), signal.SIGKILL)


def survive(how: str, folder: Path) -> float:
    """Seconds from the loss to the next step.

    Raises:
        AssertionError: it was not found, named or survived.
    """
    with SlowLink():
        processes = [launcher(host, folder) for host in range(2)]
        try:
            deadline = time.monotonic() + 200
            while not any(ranks == 2 and step > LOST_AFTER for _, step, ranks in steps(folder)):
                assert time.monotonic() < deadline, (folder / "output0").read_text()
                time.sleep(0.05)
            lost = time.monotonic()
            lose(how)
            code = processes[0].wait(100)
        finally:
            for process in processes:
                process.kill()
            lose("kill")
    assert code == 0, (folder / "output0").read_text()
    failures = [event["words"] for event in events.read(folder) if event["kind"] == "failure"]
    assert failures and WORDS[how] in failures[0], failures
    after = [(at, step) for at, step, ranks in steps(folder) if at > lost and ranks == 1]
    assert after[-1][1] == STEPS and after[0][1] > LOST_AFTER - 5, after
    return after[0][0] - lost


def main() -> int:
    """Both losses; returns 77 where this machine can't have such hosts."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ranks and namespaces must not stay behind
    for how in WORDS:
        with TemporaryDirectory() as name:
            try:
                print(f"host 1 lost by {how}: the other goes on after {survive(how, Path(name)):.1f} s", flush=True)
            except NoHosts as error:
                print(f"not run: {error}")
                return 77
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]))
    else:
        sys.exit(main())
