"""How fast a link between two hosts is, by a few messages over a socket: half a second at most.

The latency is half of the fastest of a few short messages there and back; the bandwidth is that of one stream of blocks
that double in size until one takes long enough to be timed, as in Hockney's model of a message (latency + bytes /
bandwidth).
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress

from lightning_bharat.plan.cluster import Link

MOST = 2**26  # bytes of a block
_FIRST, _LONG_ENOUGH, _TIMES = 2**16, 0.1, 8
_SIZE = struct.Struct("!I")


class SpeedServer:
    """Takes blocks and says when it has them, in threads, while it is entered.

    Attributes:
        port: where it listens, on all addresses of this host.
    """

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0))
        self.port = self._socket.getsockname()[1]

    def __enter__(self) -> SpeedServer:
        threading.Thread(target=self._serve, name="link-speed", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=_answer, args=(connection,), name="link-speed", daemon=True).start()


def measure(address: str, port: int, seconds: float = 5.0) -> Link | None:
    """The link to a host's :class:`SpeedServer`; ``None``: no answer within ``seconds``."""
    try:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            short = min(_seconds(connection, 1) for _ in range(_TIMES))
            size, took = _FIRST, _seconds(connection, _FIRST)
            while took < _LONG_ENOUGH and size < MOST:
                size *= 2
                took = _seconds(connection, size)
    except (OSError, struct.error):
        return None
    return Link(size / max(took - short, 1e-9), short / 2)


def _seconds(connection: socket.socket, size: int) -> float:
    began = time.perf_counter()
    connection.sendall(_SIZE.pack(size) + bytes(size))
    if connection.recv(1) != b"!":
        raise OSError("closed")
    return time.perf_counter() - began


def _answer(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(_FIRST))
    with connection, suppress(OSError, struct.error):
        connection.settimeout(5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            head = connection.recv(_SIZE.size, socket.MSG_WAITALL)
            left = _SIZE.unpack(head)[0]
            if left > MOST:
                return
            while left:
                left -= (got := connection.recv_into(buffer, min(left, len(buffer))))
                if not got:
                    return
            connection.sendall(b"!")
