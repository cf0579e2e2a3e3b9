"""A Ray actor on the node where a trial runs: it passes words between the controller and the process that forks ranks.

A Ray worker has threads, so that nothing may be forked from it: a process of its own has the warm server.

Sent to Ray by value, and without an import of this package: that would import torch in a process that never uses it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock


class RayWorker:
    """Runs one job at a time; one method may wait for words while another one is called.

    Args:
        command: Python code of the process that forks ranks.
        first: told to it first.
        there: the same, where this is the kernel ``kernel``.
        kernel: the boot of the controller's.
        folder: in which ranks run, if it is there.
        path: ``PYTHONPATH`` of the controller.
    """

    def __init__(self, command: str, first: bytes, there: bytes, kernel: str, folder: str, path: str | None) -> None:
        self._command, self._folder = command, folder if os.path.isdir(folder) else None
        self._is_there = bool(kernel) and kernel == boot()
        self._first = there if self._is_there else first
        self._environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
        self._sending = Lock()
        self._begin()

    def _begin(self) -> None:
        here, there = Pipe()
        with there:
            words = [sys.executable, "-c", self._command, str(there.fileno())]
            # A session of its own: a terminal's Ctrl-C is for the controller.
            self._process = subprocess.Popen(
                words, pass_fds=[there.fileno()], cwd=self._folder, env=self._environment, start_new_session=True
            )
        self._channel: Connection = here
        self._tell(self._first)

    def place(self) -> tuple[str, bool, list[str]]:
        """The node's name, whether it is the controller's machine, and the devices that Ray gave this actor."""
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return os.uname().nodename, self._is_there, devices.split(",") if devices else []

    def start(self, orders: bytes) -> list[bytes]:
        """Start a job; what it says first."""
        if self._process.poll() is not None:
            self._begin()
        return self.step(orders)

    def step(self, words: bytes) -> list[bytes]:
        """Tell it something; what it says next: nothing where its process has ended."""
        try:
            self._tell(words)
            said = [self._channel.recv_bytes()]
            while self._channel.poll():
                said.append(self._channel.recv_bytes())
            return said
        except (EOFError, OSError):
            self.end()
            return []

    def stop(self, words: bytes) -> None:
        """Tell it something while :meth:`step` waits."""
        with suppress(OSError):
            self._tell(words)

    def end(self) -> None:
        """Let the process end, with its ranks."""
        with suppress(OSError):
            self._channel.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _tell(self, words: bytes) -> None:
        with self._sending:
            self._channel.send_bytes(words)


def boot() -> str:
    """Of this kernel; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
