"""One rank's error ends all ranks within seconds, and its words are printed once.

Without this, a rank that raises leaves the others in a collective until the process group's time-out, 30 minutes by
default, and then each prints a connection error of its own. Here the first rank that fails writes its error into the
process group's store; a thread of every other rank sees it and frees its main thread.

A strategy gets all of it from the mixin :class:`~lightning_bharat.strategies.ends_together.EndsTogether`, where the
hooks are. On the first rank that fails, its own exception goes on as it is. On the others a :class:`PeerError` leaves
the trainer, or their own exception where it is the same, as when all ranks refuse one thing; ``sys.excepthook`` gives
one line for these instead of a traceback. Each process ends with an exit code other than 0.

How a main thread is freed: where it waits in Python (a sleep, a loader), a signal raises :class:`PeerError` there;
where it waits in a collective, the connection breaks when the failed rank's process ends; and one that comes back from
neither within ``grace`` seconds is ended by ``os._exit(1)``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from typing import Any

import torch.distributed as dist

from lightning_bharat.cluster.connections import is_lost_connection
from lightning_bharat.strategies.first_error import (
    FirstError,
    PeerError,
    leave_printing_to,
    print_once,
)
from lightning_bharat.strategies.liveness import Neighbours, announce

__all__ = ["ErrorWatch", "FirstError", "PeerError"]

# Its default is to be ignored: it can't hurt a process that has lost our handler. Lightning and Slurm use SIGTERM,
# SIGUSR1 and SIGUSR2.
_INTERRUPT = signal.SIGURG
_runs = count()


class ErrorWatch:
    """Tells all ranks the first error, and ends this one when it is another's.

    Args:
        store: the process group's store; the watch uses connections of its own.
        rank: this rank.
        world_size: number of ranks; with one there is nothing to watch.
        local_size: ranks on each host, which are neighbours in number; ``None``: all ranks are on this host.
        rank_name: a rank's name in messages; may be set later.
        interval: seconds between two looks into the store.
        patience: seconds in which this rank may fail by itself before it is interrupted.
        grace: seconds after which a rank that can't be interrupted is ended.
        silence: seconds without a sign of life after which a rank on another host is gone.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        local_size: int | None = None,
        rank_name: Callable[[int], str] = "rank {}".format,
        interval: float = 0.5,
        patience: float = 1.0,
        grace: float = 6.0,
        silence: float = 60.0,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.rank_name = rank_name
        self._local_size = local_size or world_size
        self._interval, self._patience, self._grace, self._silence = interval, patience, grace, silence
        self._store = store
        self._first: FirstError | None = None
        self._known = threading.Event()
        self._stopped = threading.Event()
        self._reporting = False
        self._answer: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._former_handler: Any = None

    @property
    def is_running(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._thread is not None and not self._stopped.is_set()

    @property
    def first(self) -> FirstError | None:
        """The first rank's error, as soon as this rank knows of one."""
        return self._first

    def start(self) -> None:
        """Begin to watch. Call it on every rank, in the thread that trains."""
        if self.world_size == 1 or self._thread is not None:
            return
        self._main = threading.get_ident()
        # A process may run several trainers, and torchelastic's restarts share one store.
        prefix = f"errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        store = dist.PrefixStore(prefix, self._store)
        theirs = store.clone()  # connections of our own: the group's may be blocked by the main thread
        self._store = store.clone()
        announce(self._store, self.rank)
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._former_handler = signal.signal(_INTERRUPT, self._raise_in_main)
        print_once()
        self._thread = threading.Thread(target=self._watch, args=(theirs,), name="error-watch", daemon=True)
        self._thread.start()

    def report(self, error: BaseException) -> BaseException:
        """Tell all ranks that this one ends by ``error``; returns the exception with which it should end.

        That is ``error`` itself on the first rank that failed, and where the first rank has the same; else a
        :class:`PeerError`. On the first rank it takes until the others have heard, two seconds at most.
        """
        self._reporting = True
        if self._answer is None:
            self._answer = self._settle(error) if self.is_running else error
        return self._answer

    def finish(self) -> None:
        """This rank is ready: wait until all are, and stop to watch.

        Raises:
            PeerError: another rank failed meanwhile.
        """
        if not self.is_running:
            return
        try:
            self._mark(self._store, "done")
            ready, pause = self._store.add("ready", 1), 0.001
            while ready < self.world_size and self._first is None:
                time.sleep(pause)
                ready, pause = self._store.add("ready", 0), min(1.5 * pause, 0.2)
        except dist.DistError:  # the thread is about to learn why
            self._known.wait(3)
        if self._first is not None:
            raise PeerError(self._first, self.rank_name(self.rank))
        self.stop()

    def stop(self) -> None:
        """Stop to watch: all ranks are ready, or this one has reported why it is not."""
        if self._thread is None or self._stopped.is_set():  # as is_running, in a form that says what _thread is
            return
        self._stopped.set()
        self._thread.join()
        if self._former_handler is not None:
            signal.signal(_INTERRUPT, self._former_handler)
        with suppress(dist.DistError):
            if self._first is None:
                for what in ("done", "heard", "parted"):
                    self._mark(self._store, what)
            if self._hosts_the_store():
                self._leave_as_host()

    def _leave_as_host(self) -> None:
        """The store ends with this rank's process, which would look like a failure to those that are not ready."""
        if self._first is None:
            self._store.set("parting", "")
            self._store.add("events", 1)
        self._wait_for_all("parted" if self._first is None else "heard")

    # The main thread

    def _settle(self, error: BaseException) -> BaseException:
        if isinstance(error, PeerError):
            return error
        if is_lost_connection(error):  # the consequence of something; the thread is about to learn of what
            self._known.wait(3)
        first = self._first or self._tell(FirstError.of(error, self.rank, self.rank_name(self.rank)), self._store)
        if first.rank == self.rank:
            self._wait_for_all("heard")
            return error
        answer = PeerError(first, self.rank_name(self.rank))
        if first.is_like(error):
            leave_printing_to(error, answer)
            return error
        answer.__cause__ = error
        return answer

    def _raise_in_main(self, *_: object) -> None:
        if self._first is not None and not self._reporting and not self._stopped.is_set():
            raise PeerError(self._first, self.rank_name(self.rank))

    def _wait_for_all(self, what: str, seconds: float = 2) -> None:
        gone = self._first.rank if self._first is not None and self._first.is_gone else self.rank
        others = [f"{what}/{rank}" for rank in range(self.world_size) if rank not in (self.rank, gone)]
        deadline = time.monotonic() + seconds
        with suppress(dist.DistError):
            # Not store.wait, whose time-outs write warnings.
            while not self._store.check(others) and time.monotonic() < deadline:
                time.sleep(0.01)

    # Both threads

    def _tell(self, error: FirstError, store: dist.Store) -> FirstError:
        """Write the error unless another rank was faster; returns the one that stands."""
        try:
            first = store.compare_set("error", "", json.dumps(asdict(error)))
            store.add("events", 1)
            return self._hear(first, store)
        except dist.DistError:  # the store has ended with its host
            return self._learn(error)

    def _hear(self, first: bytes, store: dist.Store) -> FirstError:
        # From here on this rank has no need of the store, which ends with rank 0 as soon as all have heard.
        self._mark(store, "heard")
        return self._learn(FirstError(**json.loads(first)))

    def _learn(self, error: FirstError) -> FirstError:
        self._first = self._first or error
        self._known.set()
        return self._first

    def _mark(self, store: dist.Store, what: str) -> None:
        store.set(f"{what}/{self.rank}", "")

    def _hosts_the_store(self, rank: int | None = None) -> bool:
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which outlives all ranks
        return not by_agent and (self.rank if rank is None else rank) == 0

    # The thread

    def _watch(self, store: dist.Store) -> None:
        neighbours = Neighbours(store, self.rank, self.world_size, self._local_size, self._silence)
        try:
            while self._first is None and not self._look(store, neighbours):
                if self._stopped.wait(self._interval if neighbours.all_met else 0.05):
                    break
        except dist.DistError:
            self._learn(
                FirstError(0, self.rank_name(0), "", "the store that it hosts, or its launcher, does not answer")
            )
        finally:
            neighbours.close()
        if self._first is not None and self._first.rank != self.rank:
            self._end_this_rank()

    def _look(self, store: dist.Store, neighbours: Neighbours) -> bool:
        """Whether there is nothing more to watch: an error is known, or the store's host is parting."""
        if (gone := neighbours.gone()) is not None:
            rank, how = gone
            error = FirstError(rank, self.rank_name(rank), "", how)
            if self._hosts_the_store(rank):
                self._learn(error)
                return True
            if not store.check([f"done/{rank}"]):
                self._tell(error, store)  # unless there are words of its own: what it wrote is there by now
            neighbours.forget(rank)
        if not store.add("events", 0):
            return False
        if store.check(["error"]):
            self._hear(store.get("error"), store)
        else:
            self._mark(store, "parted")
        return True

    def _end_this_rank(self) -> None:
        """Interrupt the main thread until it reports; end the process if it is not through its teardown in time."""
        deadline = time.monotonic() + self._grace
        self._stopped.wait(self._patience)
        while not self._stopped.is_set() and time.monotonic() < deadline:
            if not self._reporting and self._former_handler is not None:
                signal.pthread_kill(self._main, _INTERRUPT)
            self._stopped.wait(0.5)
        fails_by_itself = self._answer is not None and not isinstance(self._answer, PeerError)
        if self._first is not None and not self._stopped.is_set() and not fails_by_itself:
            self._exit(PeerError(self._first, self.rank_name(self.rank)))

    def _exit(self, error: PeerError) -> None:
        frame = sys._current_frames().get(self._main)
        where = f" ({frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name})" if frame else ""
        os.write(2, f"{error.line}; its main thread did not come back within {self._grace:g} s{where}\n".encode())
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # the main thread may hold its lock
        flush.start()
        flush.join(0.5)
        os._exit(1)
