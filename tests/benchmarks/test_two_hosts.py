"""benchmarks/two_hosts.py: the link is as slow as it says, and tensor ranks are planned inside a host."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import two_hosts
from benchmarks.slow_link import ADDRESSES, NoHosts, SlowLink, on_host
from lightning_bharat import Layout

SERVER = """
import socket
server = socket.create_server((%r, 5000))
print("ready", flush=True)
line, _ = server.accept()
for size in (1, 2_500_000):
    left = size
    while left:
        left -= len(line.recv(left))
    line.sendall(b"x")
"""
CLIENT = """
import socket, time
line = socket.create_connection((%r, 5000))
line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for size in (1, 2_500_000):
    began = time.perf_counter()
    line.sendall(bytes(size))
    assert line.recv(1)
    print(time.perf_counter() - began)
"""


def test_the_link_is_slow() -> None:
    try:
        link = SlowLink().__enter__()
    except NoHosts as error:
        pytest.skip(str(error))
    try:
        words = on_host(1, sys.executable, "-c", SERVER % ADDRESSES[1])
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            words = on_host(0, sys.executable, "-c", CLIENT % ADDRESSES[1])
            said = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
        there_and_back, of_many = map(float, said.split())
        assert there_and_back >= 2e-3
        assert of_many >= 0.9 * 2_500_000 * 8 / 100e6  # a burst goes at once
        assert link.how
    finally:
        link.__exit__()


@pytest.mark.timeout(180)
def test_two_hosts_train_together() -> None:
    plan = two_hosts.Planned("data=2, tensor=2", microbatches=1, rows=8, schedule="", seconds=0.0)
    try:
        (seconds,), _ = two_hosts.on_hosts([plan], timeout=150)
    except NoHosts as error:
        pytest.skip(str(error))
    # A rank sleeps for a quarter of the operations; how long it takes beside that is for benchmarks on a quiet machine.
    operations = 3 * two_hosts.ROWS * two_hosts.TIME * two_hosts.DEPTH * 4 * two_hosts.WIDTH * two_hosts.INNER
    assert seconds > operations / 4 / two_hosts.FLOPS


def test_tensor_ranks_are_planned_inside_a_host() -> None:
    found = two_hosts.plans()
    layouts = [Layout.parse(plan.layout) for plan in found]
    assert len(set(layouts)) == len(layouts) == 15  # four ranks, with all numbers of copies
    assert [layout.tensor for layout in layouts].index(4) == len(layouts) - 1  # the one that is on both
    assert {layout.tensor for layout in layouts[:-1]} == {1, 2}
