"""What each host of a run has: read, told to all, looked at before the start, and planned with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_bharat.cluster import inventory
from lightning_bharat.cluster.link_speed import SpeedServer, measure
from lightning_bharat.cluster.node import Node, from_text, to_text
from lightning_bharat.cluster.warm_job import free_port
from lightning_bharat.commands import launch
from lightning_bharat.commands.nodes import nodes_table
from lightning_bharat.plan.cluster import Cluster, ClusterError, Link
from tests.cluster.launching import as_before, launched
from tests.cluster.test_hosts import until
from tests.ranks import REPOSITORY


def test_this_host(tmp_path: Path) -> None:
    node = Node.read(2, tmp_path / "not" / "there" / "yet")
    assert node.name == os.uname().nodename and node.ranks == 2 and node.devices == torch.cuda.device_count()
    assert 0 < node.available <= node.memory and node.cores > 0 and node.disk > 0
    assert node.bytes_per_rank == (node.device_memory or node.memory // 2)
    linked = replace(node, link=Link(1e9, 1e-5))
    assert from_text(to_text([node, linked])) == [node, linked]
    with pytest.raises(ValueError, match="no description of nodes"):
        from_text('[{"name": "a"}]')


def test_a_link_is_measured_and_strangers_are_sent_away() -> None:
    with SpeedServer() as server, socket.create_connection(("127.0.0.1", server.port), timeout=5) as stranger:
        stranger.sendall(b"\xff\xff\xff\xff too much")
        link = measure("127.0.0.1", server.port)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert link is not None and 1e7 < link.bandwidth < 1e12 and 0 < link.latency < 0.1
    assert measure("127.0.0.1", server.port) is None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert measure("127.0.0.1", silent.getsockname()[1], seconds=0.2) is None


def test_three_hosts_tell_each_other(tmp_path: Path) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def tell(here: int) -> list[Node]:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        return inventory.exchange(store, here, 3, "127.0.0.1", replace(Node.read(1, tmp_path), name="abc"[here]))

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(tell, range(3))
    assert [node.name for node in first] == ["a", "b", "c"] and others == [first, first]
    assert all(node.link is not None for node in first)
    until(lambda: not any(thread.name == "link-speed" for thread in threading.enumerate()))


ONE = Node("a", 2, 4.0, 16 * 10**9, 10**9)
LINK = Link(1e9, 1e-5)


def test_what_is_wrong_is_said() -> None:
    assert list(inventory.warnings([ONE])) == []
    few = replace(ONE, name="b", cores=1.5, memory=8 * 10**9, link=LINK, devices=0)
    cores, link, memory = inventory.warnings([ONE, few])
    assert cores == "the link from a to the next host could not be measured: a firewall may be between them"
    assert link == "b has 1.5 cores for 2 ranks, which will wait for each other"
    assert memory == "hosts differ in memory, and ranks hold alike: b counts, with 4 GB a rank"
    devices = replace(ONE, devices=1, device="H100", device_memory=80 * 10**9)
    assert list(inventory.warnings([devices])) == ["a has 1 CUDA devices for 2 ranks"]
    shown = nodes_table([ONE, few, devices])
    assert "1 × H100" in shown and "954 MiB/s" in shown and "! b has 1.5 cores" in shown


def test_planned_with_the_least_memory_and_the_slowest_link() -> None:
    detected = Cluster(1, 8, 10**9, 1e12, Link(1e10, 1e-6))
    other = replace(ONE, name="b", memory=8 * 10**9, link=Link(5e8, 1e-3))
    cluster = inventory.on_nodes(detected, [replace(ONE, link=LINK), other])
    assert (cluster.nodes, cluster.devices_per_node, cluster.memory) == (2, 2, 4 * 10**9)
    assert cluster.inter_node == other.link and cluster.link(2, 1) == detected.intra_node
    assert "the memory is that of b" in cluster.notes[0] and "0.5 GB/s, 1e+03 µs" in cluster.notes[1]
    assert inventory.on_nodes(detected, [ONE]).devices == 2
    with pytest.raises(ClusterError, match="no link between nodes is known"):
        inventory.on_nodes(detected, [ONE, other])
    with pytest.raises(ClusterError, match="a runs 2 ranks, and b 3: "):
        inventory.on_nodes(detected, [replace(ONE, link=LINK), replace(other, ranks=3)])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone has it")
def test_ranks_know_the_hosts_and_too_few_cores_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        done = launched(tmp_path, "import os; print(os.environ['BHARAT_NODES'])", ranks=2)
    finally:
        os.sched_setaffinity(0, before)
    assert done.code == 0
    (node,) = from_text(done.output(1))
    assert (node.ranks, node.cores, node.folder) == (2, 1.0, str(tmp_path))
    assert f"{node.name} has 1 cores for 2 ranks" in capsys.readouterr().err
    (start,) = done.events("start")
    assert start["cores"] == 1.0 and start["memory"] == node.memory and start["disk"] == node.disk


def test_two_launchers_meet_and_show_what_they_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text("raise SystemExit('it was started')")
    words = ["--check", "--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    words += ["--local-addr=127.0.0.1", f"--run={tmp_path}", "--nproc-per-node=1"]
    script = str(tmp_path / "script.py")
    command = [sys.executable, "-m", "lightning_bharat.cli", "launch", *words, "--node-rank=1", script]
    other = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True
    )
    try:
        with as_before():
            assert launch.main([*words, "--node-rank=0", script]) == 0
        said, _ = other.communicate(timeout=60)
    finally:
        other.kill()
    assert other.returncode == 0
    shown = capsys.readouterr().out
    assert said == shown and shown.count(os.uname().nodename) == 2 and "/s" in shown.splitlines()[1]
    assert not list(tmp_path.glob("events.jsonl"))
