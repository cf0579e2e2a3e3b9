"""Links between ranks, tried one pair after another over sockets of their own."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

from lightning_bharat.health.finding import Finding

PAYLOAD = os.urandom(2**16)
PINGS = 3  # of which the fastest counts: one that waits for a busy processor says nothing of a link
SLOW = 10.0  # times the median of all pairs
LEAST_SLOW = 0.05  # seconds; for 64 KiB there and back
_SIZE = struct.Struct("!I")


class Responder:
    """Sends back what it gets, in a thread, as long as the process lives.

    Attributes:
        port: where it listens.
    """

    def __init__(self, host: str = "") -> None:
        self._socket = socket.create_server((host, 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="health-links", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends the wait for a connection
        self._thread.join(2)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection, suppress(OSError, struct.error):
                connection.settimeout(5)
                for _ in range(PINGS):
                    connection.sendall(_received(connection))


def ping(host: str, port: int, seconds: float = 2.0) -> float | None:
    """Seconds for 64 KiB there and back; ``None``: no answer within ``seconds``."""
    took = []
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            connection.settimeout(seconds)
            for _ in range(PINGS):
                began = time.perf_counter()
                connection.sendall(_SIZE.pack(len(PAYLOAD)) + PAYLOAD)
                _received(connection)
                took.append(time.perf_counter() - began)
    except (OSError, struct.error):
        return None
    return min(took)


def _received(connection: socket.socket) -> bytes:
    (length,) = _SIZE.unpack(_exactly(connection, _SIZE.size))
    if length > len(PAYLOAD):
        raise OSError("not one of ours")
    return _SIZE.pack(length) + _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise OSError("closed")
        parts += part
    return bytes(parts)


def partner(rank: int, ranks: int, turn: int) -> int | None:
    """Whom ``rank`` is paired with in a turn of a round robin (the circle method): after as many turns as there are
    ranks every pair has been tried once, and in no turn a rank is in two pairs.

    >>> [[partner(rank, 4, turn) for rank in range(4)] for turn in range(3)]
    [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]
    """
    even = ranks + ranks % 2
    last = even - 1
    alone = turn * (even // 2) % last  # twice this is the turn; the last rank's partner
    other = alone if rank == last else last if rank == alone else (turn - rank) % last
    return other if other < ranks else None


@dataclass(frozen=True)
class Tried:
    """A pair, and the seconds that it took; ``None``: no answer."""

    a: int
    b: int
    seconds: float | None


class LinkDetector:
    """Says which pairs are dead or slow, and from them which rank or node.

    A link is dead without an answer, and slow where it takes ten times the median of what all pairs took of late and
    50 ms at least; in both cases twice in a row.

    Between hosts the culprit is the host, or one rank of it, that has no good link to another host. Of two hosts that
    can't be told: then the one without rank 0 is named, since the other one most likely serves the rendezvous.

    Args:
        name: a rank's name in messages.
    """

    def __init__(self, name: Callable[[int], str] = "rank {}".format) -> None:
        self._name = name
        self._last: dict[tuple[int, int], float | None] = {}
        self._usual: deque[float] = deque(maxlen=256)
        self._in_a_row: Counter[tuple[int, int]] = Counter()

    def look(self, tried: Iterable[Tried], hosts: Mapping[int, str]) -> list[Finding]:
        """Take in what was tried."""
        tried = list(tried)
        pairs = [(min(t.a, t.b), max(t.a, t.b)) for t in tried]
        self._last.update({pair: t.seconds for pair, t in zip(pairs, tried, strict=True)})
        self._usual += [t.seconds for t in tried if t.seconds is not None]
        new = []
        for pair in dict.fromkeys(pairs):
            self._in_a_row[pair] = self._in_a_row[pair] + 1 if self._is_bad(pair) else 0
            if self._in_a_row[pair] == 2:
                new.append(pair)
        return [self._words(pair, hosts) for pair in new]

    def _is_bad(self, pair: tuple[int, int]) -> bool:
        took = self._last[pair]
        if took is None:
            return True
        return took > max(SLOW * median(self._usual), LEAST_SLOW)

    def _words(self, pair: tuple[int, int], hosts: Mapping[int, str]) -> Finding:
        took = self._last[pair]
        how = "does not answer" if took is None else f"takes {1e3 * took:.1f} ms"
        usual = f" (the median of all pairs is {1e3 * median(self._usual):.1f} ms)" if self._usual else ""
        a, b = (f"{self._name(rank)} on {hosts.get(rank, '?')}" for rank in pair)
        culprit, host = self._culprit(pair, hosts)
        named = f"; {self._name(culprit)} is in every pair that fails" if culprit is not None else ""
        if culprit is None and host:
            named = f"; {host} is in every pair of hosts that fails"
        host = host or self._other_than_first(pair, hosts)
        return Finding("link", f"the link between {a} and {b} {how}{usual}{named}", culprit, host, {"pair": list(pair)})

    def _culprit(self, pair: tuple[int, int], hosts: Mapping[int, str]) -> tuple[int | None, str]:
        """The one of two hosts, or of two ranks, whose links are all bad, where the other has a good one."""
        crosses = hosts.get(pair[0]) != hosts.get(pair[1])  # then links inside of a host say nothing
        good = [
            other
            for other in self._last
            if not self._is_bad(other) and not (crosses and hosts.get(other[0]) == hosts.get(other[1]))
        ]
        ranks = {rank for other in good for rank in other}
        there = {hosts.get(rank) for rank in ranks}
        bad = [hosts.get(rank, "?") for rank in pair if hosts.get(rank) not in there]
        if crosses and len(bad) == 1 and list(hosts.values()).count(bad[0]) > 1:
            return None, bad[0]
        suspects = [rank for rank in pair if rank not in ranks]
        return (suspects[0], hosts.get(suspects[0], "?")) if len(suspects) == 1 else (None, "")

    @staticmethod
    def _other_than_first(pair: tuple[int, int], hosts: Mapping[int, str]) -> str:
        return hosts.get(pair[0] if hosts.get(pair[1]) == hosts.get(0) else pair[1], "?")


def tried_in_turn(rank: int, turn: int, addresses: Sequence[tuple[str, int] | None]) -> Tried | None:
    """Try this rank's pair of a turn; the lower rank of a pair does."""
    other = partner(rank, len(addresses), turn)
    if other is None or other < rank or addresses[other] is None:
        return None
    return Tried(rank, other, ping(*addresses[other]))  # type: ignore[misc]
