"""The ranks of a trial on a Ray node, as the controller follows them."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.cluster.warm import Call
from lightning_bharat.cluster.warm_job import Answer

STOP_SECONDS = 15.0  # ranks that hang get 5 s for their stacks


class RayJob:
    """A job that a :class:`~lightning_bharat.cluster.ray_worker.RayWorker` runs.

    One call of the actor is out at any time. It returns what the ranks ask, and the next one brings the answers.

    Args:
        actor: the worker's handle.
        call: of each rank.
        ranks: how many.
        env: variables of each.
        answer: see :meth:`~lightning_bharat.cluster.warm.WarmServer.start`.
        outputs: folder for what they write.
        lost: called when the actor is of no use any more.
    """

    def __init__(
        self,
        actor: Any,
        call: Call,
        ranks: int,
        env: dict[str, str],
        answer: Answer,
        outputs: Any,
        lost: Callable[[], None],
    ) -> None:
        self._actor, self.ranks, self._answer, self._lost = actor, ranks, answer, lost
        self._outcomes: list[RankOutcome] = []
        self._here, self._there = socket.socketpair()
        self._follow(actor.start.remote(pickle.dumps(("start", call, ranks, env, outputs))))

    @property
    def waitables(self) -> list[Any]:
        """One is ready when the actor has something to say."""
        return [self._here]

    @property
    def over(self) -> bool:
        """Whether it is known how all ranks ended."""
        return bool(self._outcomes)

    def look(self, timeout: float) -> None:
        """Wait ``timeout`` seconds at most until the ranks ask something or have ended, and answer.

        Raises:
            RayTaskError: a fault of the actor's own.
        """
        if self.over or not wait(self.waitables, timeout):
            return
        self._here.recv(1)
        try:
            said = self._out.result()
        except RayTaskError:
            raise
        except RayError as error:  # the actor or its node has died
            self._lose(f"its Ray worker has ended: {str(error).splitlines()[0]}")
            return
        if not said:
            self._lose("the process that forked it has ended")
            return
        self._hear(said)

    def finish(self) -> list[RankOutcome]:
        """How each rank ended; those that still run are killed."""
        if not self.over:
            self._actor.stop.remote(pickle.dumps(("stop",)))
            self._settle()
        self._here.close()
        self._there.close()
        return self._outcomes

    def _settle(self) -> None:
        while not self.over:
            if not wait(self.waitables, STOP_SECONDS):
                self._lose("it was stopped, and its Ray worker did not answer")
                return
            self.look(0)

    def _hear(self, said: list[bytes]) -> None:
        answers: list[tuple[int, Any]] = []
        for what, *content in map(pickle.loads, said):  # of our own process, by our own actor
            if what == "ask":
                answers += self._answer(*content)
            else:
                (self._outcomes,) = content
        if not self.over:
            self._follow(self._actor.step.remote(pickle.dumps(("answers", answers))))

    def _follow(self, call: ray.ObjectRef) -> None:
        self._out: Future[list[bytes]] = call.future()
        self._out.add_done_callback(self._poke)

    def _poke(self, _: Future[list[bytes]]) -> None:
        """In a thread of Ray's."""
        with suppress(OSError):  # it is finished
            self._there.send(b"\0")

    def _lose(self, why: str) -> None:
        self._outcomes = [RankOutcome(rank, lost=why) for rank in range(self.ranks)]
        self._lost()
