"""Disks, memory, links and batches that are really full, short, cut off or bad."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_bharat.health import leak
from lightning_bharat.health.batch import BatchCheck, of_loader
from lightning_bharat.health.device import DeviceCheck
from lightning_bharat.health.disk import DiskCheck
from lightning_bharat.health.host_memory import HostMemoryCheck, Sources
from lightning_bharat.health.leak import LeakDetector
from lightning_bharat.health.links import LinkDetector, Responder, Tried, partner, ping
from lightning_bharat.health.out_of_memory import held, is_out_of_memory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_and_is_emptied(small_disk: Path) -> None:
    check = DiskCheck([small_disk / "checkpoints", small_disk / "checkpoints"])
    assert not list(check.look())
    (small_disk / "most").write_bytes(bytes(1020 * 1024))
    (nearly,) = check.look()
    assert nearly.message == f"{small_disk / 'checkpoints'}: nearly full: 0 of 1 MiB are free"
    with suppress(OSError):
        (small_disk / "rest").write_bytes(bytes(2**20))
    (full,) = check.look()
    assert full.message.endswith("can't be written to: No space left on device") and not list(check.look())
    (small_disk / "most").unlink()
    (small_disk / "rest").unlink()
    assert not list(check.look())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (read_only,) = check.look()
    assert read_only.message.endswith("can't be written to: Read-only file system")


def test_a_host_short_of_memory(tmp_path: Path) -> None:
    """The kernel's files as it writes them, with numbers that this machine can't be brought to."""
    pressure, group = tmp_path / "pressure", tmp_path / "group"
    group.mkdir()
    some = "some avg10=60.00 avg60=20.00 avg300=5.00 total=123"
    pressure.write_text(f"{some}\nfull avg10=42.50 avg60=9.00 avg300=1.00 total=99\n")
    (group / "memory.max").write_text("1073741824\n")
    (group / "memory.current").write_text("1063741824\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    check = HostMemoryCheck(Sources(pressure, Path("/proc/meminfo"), (group,)))
    stalls, limit = check.look()
    assert stalls.message == "all work waited for memory in 42 % of the last 10 s"
    assert limit.message == f"1014 of 1024 MiB of {group} are used"
    assert not check.look()  # said once
    (group / "memory.stat").write_text("inactive_file 900000000\n")  # pages of files, which the kernel gives back
    pressure.write_text(f"{some}\nfull avg10=0.00 avg60=9.00 avg300=1.00 total=99\n")
    assert not check.look()


def test_here_the_kernel_tells_something() -> None:
    sources = Sources.here()
    assert any(path.is_dir() for path in sources.groups) or sources.pressure.exists() or sources.meminfo.exists()
    HostMemoryCheck(sources).look()


def test_a_process_that_really_leaks() -> None:
    detector, kept, found = LeakDetector(), [], None
    for _ in range(90):
        kept.append(bytearray(os.urandom(1024)) * 1024)
        found = found or detector.look(leak.resident())
    assert found == pytest.approx(2**20, rel=0.3)


def test_running_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.float64)
    assert is_out_of_memory(raised.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    weights = torch.zeros(3 * 2**18)
    said = held([("weights", [weights, weights.view(3, -1), None]), ("gradients", [None])], torch.device("cpu"))
    assert said.startswith("weights 3.0 MiB, gradients 0.0 MiB, process ")


def test_each_pair_is_tried_once() -> None:
    for ranks in (2, 3, 4, 7, 8):
        pairs = [
            (rank, other)
            for turn in range(ranks + ranks % 2 - 1)
            for rank in range(ranks)
            if (other := partner(rank, ranks, turn)) is not None and rank < other
        ]
        assert sorted(pairs) == [(a, b) for a in range(ranks) for b in range(a + 1, ranks)]
        for turn in range(ranks):
            for rank in range(ranks):
                other = partner(rank, ranks, turn)
                assert other is None or partner(other, ranks, turn) == rank


RESPOND = """
import sys
sys.argv[0] = "bharat"  # which imports no Lightning
from lightning_bharat.health.links import Responder
responder = Responder("127.0.0.1")
print(responder.port, flush=True)
input()
"""


def test_a_stopped_process_is_in_every_pair_that_fails() -> None:
    """The kernel still takes connections for it: only an answer shows that it lives."""
    process = subprocess.Popen([sys.executable, "-c", RESPOND], stdin=-1, stdout=-1, text=True)
    here = Responder("127.0.0.1")
    try:
        assert process.stdout is not None
        ports = {0: here.port, 1: int(process.stdout.readline()), 2: here.port}
        detector, hosts = LinkDetector(), {0: "a", 1: "b", 2: "c"}

        def turn(seconds: float) -> list[str]:
            tried = [Tried(a, b, ping("127.0.0.1", ports[b], seconds)) for a, b in ((0, 1), (0, 2))]
            return [f.message for f in detector.look([*tried, Tried(1, 2, tried[0].seconds)], hosts)]

        assert not turn(5) and not turn(5)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # until it is
        assert not turn(0.2)
        found = turn(0.2)
        assert found[0].startswith("the link between rank 0 on a and rank 1 on b does not answer (the median of all")
        assert all("rank 1 is in every pair that fails" in words for words in found) and len(found) == 2
        process.send_signal(signal.SIGCONT)
        assert not turn(5)
    finally:
        process.kill()
        process.wait()
        here.close()


def test_what_is_not_one_of_ours_is_sent_away() -> None:
    responder = Responder("127.0.0.1")
    with socket.create_connection(("127.0.0.1", responder.port), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    assert ping("127.0.0.1", responder.port) is not None
    responder.close()
    assert ping("127.0.0.1", responder.port, 0.5) is None


def test_a_slow_link() -> None:
    detector, hosts = LinkDetector(), dict.fromkeys(range(4), "host")
    every = [Tried(a, b, 0.001) for a in range(4) for b in range(a + 1, 4)]
    slow = [Tried(t.a, t.b, 0.4) if 3 in (t.a, t.b) else t for t in every]
    assert not detector.look(every, hosts) and not detector.look(slow, hosts)
    found = detector.look(slow, hosts)
    assert {finding.rank for finding in found} == {3} and "takes 400.0 ms" in found[0].message


@pytest.mark.parametrize(("many", "slow", "named"), [(2, "b", ""), (3, "b", "b"), (3, "a", "a"), (3, "", "")])
def test_the_host_behind_a_slow_link(many: int, slow: str, named: str) -> None:
    """Two ranks on each. Of two hosts it can't be told which is behind it: the one without rank 0 is named."""
    detector, hosts = LinkDetector(), {rank: "abc"[rank // 2] for rank in range(2 * many)}
    every = [Tried(a, b, 0.001) for a in hosts for b in hosts if a < b]
    single = (1, 4)  # ranks of hosts a and c, where no host as a whole is slow

    def is_slow(a: int, b: int) -> bool:
        return slow in (hosts[a], hosts[b]) and hosts[a] != hosts[b] if slow else (a, b) == single

    after = [Tried(t.a, t.b, 0.4) if is_slow(t.a, t.b) else t for t in every]
    assert not detector.look(every, hosts) and not detector.look(after, hosts)
    found = detector.look(after, hosts)
    assert {finding.host for finding in found} == {named or hosts[2 * many - 1]}
    words = f"; {named} is in every pair of hosts that fails"
    assert all((words in finding.message) == bool(named) and finding.rank is None for finding in found)


def test_bad_batches() -> None:
    check = BatchCheck(100, mend=True)
    ids, x = torch.full((2, 3), 7), torch.ones(2, 3)
    good = {"ids": ids, "labels": torch.tensor([[1, -100, 99]]), "x": x}
    assert check.look(good)[0] is False
    for batch, words in (
        ({"ids": torch.tensor([[0, 100]])}, "ids: outside of 0 to 99"),
        ({"ids": torch.tensor([[0, -1]])}, "ids: outside of 0 to 99"),
        ([torch.tensor([1.0, torch.nan]), ids], "0: not finite"),
        ({"a": {"x": torch.tensor([torch.inf])}}, "a.x: not finite"),
        ({"ids": torch.empty(0, 5)}, "ids: no elements"),
        ({}, "the batch: nothing in it"),
    ):
        is_bad, what = check.look(batch)
        assert is_bad is True and what() == words
        leaves = batch.values() if isinstance(batch, dict) else batch
        for tensor in leaves:  # what was bad is harmless now
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                assert tensor.isfinite().all() and tensor.min() >= 0 and tensor.max() < 100
    assert BatchCheck(None, mend=False).look({"ids": torch.tensor([[-5, 10**6]])})[0] is False


class OneIsBroken(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            raise OSError(f"part-{index}.bin is cut off")
        return torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_can_t_be_read(workers: int) -> None:
    with pytest.raises(OSError) as raised:
        list(DataLoader(OneIsBroken(), batch_size=2, num_workers=workers))
    found = of_loader(raised.value, 2)
    assert found is not None and found.kind == "loader"
    samples = " (samples 4, 5)" if workers == 0 else ""
    assert found.message == f"the loader raised OSError for batch 2{samples}: part-5.bin is cut off"
    assert of_loader(ValueError("in a step"), 2) is None


def test_no_threads_stay() -> None:
    before = threading.active_count()
    Responder("127.0.0.1").close()
    assert threading.active_count() <= before


def test_without_nvml_nothing_is_looked_at() -> None:
    assert not list(DeviceCheck("GPU-0").look())


@pytest.mark.gpu
def test_a_device_that_is_well() -> None:
    check = DeviceCheck(str(torch.cuda.get_device_properties(0).uuid))
    assert check.works and not list(check.look())
