"""A Slurm of one's own for tests: several nodes on this machine, its daemons in a folder and ended with the tests.

It needs root, and the Debian or Ubuntu package ``slurm-wlm``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.cluster.warm_job import free_port
from tests.ranks import REPOSITORY

DAEMONS = ("munged", "slurmctld", "slurmd", "srun")
# No cgroups, no accounting: what starts and ends processes, and nothing else.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN\n"
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\nCgroupAutomount=no\n"


def is_missing() -> str:
    """ "" or what is not there."""
    if os.geteuid():
        return "Slurm's daemons start as root"
    return ", ".join(name for name in DAEMONS if _path(name) is None)


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


@contextmanager
def slurm(folder: Path, nodes: Sequence[str] = ("one", "two")) -> Iterator[dict[str, str]]:
    """The variables with which ``srun`` finds the cluster, while it runs."""
    folder.chmod(0o755)
    for name in ("state", "cgroup"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf, variables = folder / "slurm.conf", {"SLURM_CONF": str(folder / "slurm.conf")}
    those = "".join(NODE.format(name=name, host=host, port=free_port()) for name in nodes)
    conf.write_text(CONF.format(host=host, folder=folder, controller=free_port()) + those)
    (folder / "cgroup.conf").write_text(CGROUP.format(folder=folder))
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    with ExitStack() as daemons:

        def start(name: str, *words: str) -> None:
            with (folder / f"{name}.log").open("w") as log:
                command = [str(_path(name)), *words]
                daemon = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
            daemons.callback(_end, daemon)

        start("munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *files)
        _wait(folder / "munge.sock")
        start("slurmctld", "-D", "-f", str(conf))
        for name in nodes:
            start("slurmd", "-D", "-f", str(conf), "-N", name)
        yield variables


def srun(options: Sequence[str], script: Sequence[str], env: Mapping[str, str], timeout: float = 100) -> RankOutcome:
    """Run ``python *script`` in each task of a job; exit code and output of all together.

    Raises:
        subprocess.TimeoutExpired: with what was written until then.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo", **env}
    done = subprocess.run(
        ["srun", *options, sys.executable, *script],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return RankOutcome(0, exit_code=done.returncode, output=done.stdout)


def _wait(path: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def _end(daemon: subprocess.Popen) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
