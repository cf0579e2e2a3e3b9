"""Launchers miss each other, and leave out hosts that are bad. On two hosts: tests/faults/two_hosts.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_bharat.cluster import hosts
from lightning_bharat.cluster.bad_nodes import BadNodes
from lightning_bharat.cluster.failure import RankEnd, of_ends
from lightning_bharat.cluster.hosts import Hosts
from lightning_bharat.commands import launch


def until(there: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_host_that_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "SILENCE", 1.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second, third = (Hosts("127.0.0.1", store.port, rank, 3) for rank in range(3))
    until(lambda: all(store.check([f"hosts/name/{rank}"]) for rank in range(3)))
    assert not any(each.lost for each in (first, second, third))
    second.stop()
    until(lambda: first.lost and third.lost)
    assert "host 1 (" in first.lost and "no sign of life for 1 s" in first.lost and not second.lost
    for each in (first, third):
        each.stop()


def test_a_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "SILENCE", 1.0)
    servers = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    second = Hosts("127.0.0.1", servers[0].port, 1, 2)
    until(lambda: servers[0].check(["hosts/name/1"]))
    servers.clear()
    until(lambda: second.lost)
    assert "the host that serves the store (127.0.0.1) has not answered" in second.lost


def test_a_host_whose_ranks_are_lost_again_and_again_is_left_out(tmp_path: Path) -> None:
    lost = of_ends([RankEnd(2, -9)])
    raised = of_ends([RankEnd(2, 1, "ValueError", "bad row")])
    elsewhere = of_ends([RankEnd(2, 1, "PeerError", "rank 5 is gone", is_victim=True)])
    assert lost and raised and elsewhere
    nodes = BadNodes("node7")
    for failure in (lost, raised, elsewhere, lost, raised, elsewhere):
        assert nodes.judge(failure, tmp_path) == ""
    assert nodes.refuse(tmp_path) == ""
    assert "node7 is on the list of bad nodes: 3 of its ranks were lost" in nodes.judge(lost, tmp_path)
    why = BadNodes("node7").refuse(tmp_path)
    assert "rank 2 was ended by SIGKILL" in why and "Take its line out" in why
    assert BadNodes("node8").refuse(tmp_path) == ""


def test_a_host_that_health_monitor_wants_out(tmp_path: Path) -> None:
    words = "leave out node7, node9 and restart: device: uncorrectable memory errors"
    asked = of_ends([RankEnd(0, 1, "HealthError", words)])
    assert asked and asked.cause == "health" and not asked.is_of_program
    assert "node9 is on the list" in BadNodes("node9").judge(asked, tmp_path)
    assert BadNodes("node8").judge(asked, tmp_path) == ""
    assert (tmp_path / "bad_nodes.txt").read_text().startswith("node9\t")


def test_a_host_on_the_list_takes_no_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad_nodes.txt").write_text(f"{os.uname().nodename}\tby hand\n")
    words = ["--run", str(tmp_path), "--nnodes=1:2", "--master-addr=127.0.0.1", __file__]
    assert launch.main(words) == 1
    assert "bad_nodes.txt: by hand. Take its line out" in capsys.readouterr().err
