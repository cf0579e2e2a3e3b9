"""How ranks start: by Lightning, by torchrun on one and on two nodes, by Slurm. Real processes, each in each launcher.

One start shows all: ranks and their places, losses like one process's, a tensor size that does not fit on a node, and
how everything ends when one rank fails.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.cluster.warm_job import free_port
from tests.ranks import fresh_ranks, run_ranks, torchrun
from tests.slurm import is_missing, slurm, srun
from tests.strategies import launched
from tests.strategies.launched import WORDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SCRIPT = launched.__file__
LIMIT = 10  # seconds from the error to the end of the last process
# As on a machine without any launcher, whatever this one has.
FOREIGN = ("SLURM_", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_RANK")


@pytest.fixture(autouse=True)
def no_launcher_s_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def losses() -> list[float]:
    return run_ranks(launched.in_one_process, 1)[0]


def together(starts: Sequence[Callable[[], RankOutcome]]) -> list[RankOutcome]:
    """Each on a node of its own, as far as a launcher can tell."""
    with ThreadPoolExecutor(len(starts)) as nodes:
        return list(nodes.map(lambda start: start(), starts))


def check(folder: Path, outcomes: list[RankOutcome], losses: list[float], ranks: int, environment: str) -> list[dict]:
    """What holds for each launcher; returns what each rank saw."""
    everything = "\n".join(outcome.output for outcome in outcomes)
    began = [float(line.split()[-1]) for line in everything.splitlines() if "failing at" in line]
    assert len(began) == 1, everything
    assert time.monotonic() - began[0] < LIMIT + 5, everything  # the launcher itself has to notice, and to end
    assert all(outcome.exit_code not in (0, None) and not outcome.timed_out for outcome in outcomes), everything
    assert everything.count(f"LookupError: {WORDS}") == 1, everything
    assert everything.count("raised LookupError and prints it") == ranks - 1, everything
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    for rank, here in enumerate(seen):
        assert here["environment"] == environment
        assert here["rank"] == rank
        assert here["losses"] == pytest.approx(losses, rel=1e-9, abs=1e-9)
    return seen


def places(seen: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(here["node"], here["local rank"]) for here in seen]


def words(folder: Path, devices: int, nodes: int, tensor: int) -> list[str]:
    return [SCRIPT, str(folder), str(devices), str(nodes), str(tensor)]


def test_lightning_starts_ranks(tmp_path: Path, losses: list[float]) -> None:
    outcomes = fresh_ranks(words(tmp_path, 2, 1, 1))
    seen = check(tmp_path, outcomes, losses, 2, "LightningEnvironment")
    assert [here["name"] for here in seen] == ["rank 0 (data 0)", "rank 1 (data 1)"]


def test_torchrun_starts_ranks(tmp_path: Path, losses: list[float]) -> None:
    outcome = torchrun(words(tmp_path, 2, 1, 2), ranks=2)
    seen = check(tmp_path, [outcome], losses, 2, "TorchElasticEnvironment")
    assert [here["name"] for here in seen] == ["rank 0 (tensor 0)", "rank 1 (tensor 1)"]


def test_torchrun_starts_ranks_on_two_nodes(tmp_path: Path, losses: list[float]) -> None:
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    launcher += [f"--master-port={free_port()}"]

    def node(number: int) -> Callable[[], RankOutcome]:
        return lambda: fresh_ranks([*launcher, f"--node-rank={number}", *words(tmp_path, 2, 2, 2)])[0]

    seen = check(tmp_path, together([node(0), node(1)]), losses, 4, "TorchElasticEnvironment")
    assert places(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [here["nodes of tensor peers"] for here in seen] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert [here["name"] for here in seen] == [
        "rank 0 (data 0, tensor 0)",
        "rank 1 (data 0, tensor 1)",
        "rank 2 (data 1, tensor 0)",
        "rank 3 (data 1, tensor 1)",
    ]
    for here in seen:  # right, and slow, which one rank says
        assert here["across"]["losses"] == pytest.approx(losses, rel=1e-9, abs=1e-9)
    (said,) = [text for here in seen for text in here["across"]["warnings"]]
    assert "tensor_parallel_size=4" in said and "2 devices of a node" in said and "tensor_parallel_size=2" in said


@pytest.mark.skipif(
    bool(is_missing()), reason=f"Slurm is not installed ({is_missing()}): its variables are tested below"
)
def test_slurm_starts_ranks(tmp_path: Path, losses: list[float]) -> None:
    """A real one of two nodes. ``srun`` itself does not end a job when one of its tasks fails."""
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm") as variables:
        job = {"MASTER_ADDR": "127.0.0.1", **variables}  # its nodes have names that no name server knows
        outcome = srun(["--nodes=2", "--ntasks-per-node=1"], words(tmp_path, 1, 2, 1), job)
    seen = check(tmp_path, [outcome], losses, 2, "SLURMEnvironment")
    assert places(seen) == [(0, 0), (1, 0)]


@pytest.mark.skipif(not is_missing(), reason="Slurm itself is here, and is tested above")
def test_slurm_s_variables_are_read(tmp_path: Path, losses: list[float]) -> None:
    """No Slurm, but two processes that have what ``srun`` gives to two nodes of one task each."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost", "MASTER_PORT": str(free_port())}

    def task(number: int) -> Callable[[], RankOutcome]:
        mine = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURM_LOCALID": "0"}
        return lambda: fresh_ranks(words(tmp_path, 1, 2, 1), env={**job, **mine})[0]

    seen = check(tmp_path, together([task(0), task(1)]), losses, 2, "SLURMEnvironment")
    assert places(seen) == [(0, 0), (1, 0)]
