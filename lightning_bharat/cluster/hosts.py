"""Whether the launchers of an attempt's other hosts are there: a rank may wait for hours for one behind a cut link."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

SILENCE = 10.0  # seconds after which a host is gone


class Hosts:
    """Gives signs of life in an attempt's store, and looks for those of the others; in a thread, since a store behind a
    cut link blocks.

    Args:
        address, port: of the store.
        rank: of this host.
        size: number of hosts.

    Attributes:
        lost: in words, which host is gone; empty: none.
    """

    def __init__(self, address: str, port: int, rank: int, size: int) -> None:
        self.lost = ""
        self._rank, self._size = rank, size
        self._place = (address, port)
        self._stopped = threading.Event()
        self._seen = {other: (-1, time.monotonic()) for other in range(size) if other != rank}
        if size > 1:
            threading.Thread(target=self._watch, name="hosts", daemon=True).start()

    def stop(self) -> None:
        """Look no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        last = time.monotonic()
        try:
            limit = timedelta(seconds=SILENCE / 2)
            store = dist.TCPStore(*self._place, is_master=False, wait_for_workers=False, timeout=limit)
            store.set(f"hosts/name/{self._rank}", os.uname().nodename)
            while not self._stopped.wait(SILENCE / 10) and not self.lost:
                self._look(store)
                last = time.monotonic()
        except (dist.DistError, RuntimeError):
            if not self._stopped.is_set():
                silent = time.monotonic() - last
                self.lost = f"the host that serves the store ({self._place[0]}) has not answered for {silent:.0f} s"

    def _look(self, store: dist.Store) -> None:
        store.add(f"hosts/beat/{self._rank}", 1)
        now = time.monotonic()
        for other, (beats, since) in self._seen.items():
            count = store.add(f"hosts/beat/{other}", 0)
            if count != beats:
                self._seen[other] = (count, now)
            elif now - since > SILENCE:
                key = f"hosts/name/{other}"
                name = store.get(key).decode() if store.check([key]) else "?"
                self.lost = f"host {other} ({name}) has given no sign of life for {now - since:.0f} s"
