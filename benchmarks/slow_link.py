"""Two hosts on one Linux machine: network namespaces with a slow link between them. Needs root and iproute2.

Where the kernel has ``netem``, that delays and limits a pair of ``veth``. Elsewhere two ``tun`` devices are the ends, a
thread carries packets from one to the other when their delay is over, and ``tbf`` limits the rate.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from select import select

NAMES = ("bharat-a", "bharat-b")  # of the namespaces
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "slow0"  # in each of them
MTU = 9000  # fewer packets to carry
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class NoHosts(RuntimeError):
    """This machine can't have them; says what is missing."""


class SlowLink:
    """While it is entered there are two hosts, ``NAMES``, with ``ADDRESSES``. Waits while another process has them.

    Args:
        delay: seconds, each way.
        rate: bits a second, each way.

    Attributes:
        how: what makes the link slow, in words.

    Raises:
        NoHosts: on entering.
    """

    def __init__(self, delay: float = 1e-3, rate: float = 100e6) -> None:
        self.delay, self.rate, self.how = delay, rate, ""
        self._ends: list[int] = []
        self._stopped = threading.Event()
        self._carrier: threading.Thread | None = None

    def __enter__(self) -> SlowLink:
        if os.geteuid() != 0:
            raise NoHosts("network namespaces need root")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise NoHosts(f"{tool} is missing; install iproute2")
        self._lock = open("/run/bharat-hosts.lock", "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # there is one such pair of hosts on a machine
        _delete()  # of a process that was killed
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            words = getattr(error, "stderr", None) or str(error)
            raise NoHosts(f"no network namespaces with a slow link: {words.strip()}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._carrier is not None and self._carrier.is_alive():
            self._carrier.join()
        for end in self._ends:
            os.close(end)
        _delete()
        self._lock.close()

    def _make(self) -> None:
        for name in NAMES:
            _run("ip", "netns", "add", name)
            _run(*_inside(name), "ip", "link", "set", "lo", "up")
        _run("ip", "-n", NAMES[0], "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", NAMES[1])
        try:
            for name in NAMES:
                _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *self._limits())
            self.how = "netem"
        except subprocess.CalledProcessError:
            _run("ip", "-n", NAMES[0], "link", "del", DEVICE)
            self._carry()
            self.how = "packets carried between tun devices, tbf (this kernel has no netem)"
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(MTU), "up")

    def change(self, delay: float, rate: float) -> None:
        """Make it slower or faster from now on."""
        self.delay, self.rate = delay, rate
        for name in NAMES:
            _run("tc", "-n", name, "qdisc", "change", "dev", DEVICE, "root", *self._limits())

    def _limits(self) -> tuple[str, ...]:
        if self._carrier is None:
            return "netem", "delay", f"{self.delay * 1e3:g}ms", "rate", f"{self.rate:.0f}"
        return "tbf", "rate", f"{self.rate:.0f}bit", "burst", "64kb", "latency", "400ms"

    def _carry(self) -> None:
        self._carrier = threading.Thread(target=self._deliver, daemon=True)
        for i, name in enumerate(NAMES):
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            self._ends.append(end)
            made = f"bharat{i}"
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", made.encode(), _IFF_TUN | _IFF_NO_PI))
            _run("ip", "link", "set", made, "netns", name)
            _run("ip", "-n", name, "link", "set", made, "name", DEVICE)
            _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *self._limits())
        self._carrier.start()

    def _deliver(self) -> None:
        with suppress(OSError):  # late packets are long delays
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -15)
        there = dict(zip(self._ends, reversed(self._ends), strict=True))
        waiting: deque[tuple[float, int, bytes]] = deque()
        while not self._stopped.is_set():
            pause = max(waiting[0][0] - time.monotonic(), 0) if waiting else 0.05
            ready, _, _ = select(self._ends, [], [], pause)
            for end in ready:
                with suppress(OSError):  # the other end is not up yet
                    waiting.append((time.monotonic() + self.delay, there[end], os.read(end, 2**16)))
            while waiting and waiting[0][0] <= time.monotonic():
                _, end, packet = waiting.popleft()
                with suppress(OSError):
                    os.write(end, packet)


def on_host(number: int, *words: str) -> list[str]:
    """The command line that runs ``words`` on host ``number``."""
    return [*_inside(NAMES[number]), *words]


def _delete() -> None:
    for name in NAMES:
        with suppress(subprocess.CalledProcessError):
            _run("ip", "netns", "del", name)


def _inside(name: str) -> tuple[str, ...]:
    return "ip", "netns", "exec", name


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
