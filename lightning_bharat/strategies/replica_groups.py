"""Replica groups that train one model step by step, of which any may die: what they say to each other by torchft."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bharat.strategies import _torchft

RETRIES = 20  # steps in a row that are lost before a group gives up


class ReplicaError(RuntimeError):
    """What replica groups can't do, or what has come between them; the message says what to write or do."""


class ReplicaGroups:
    """This process among the replica groups of a run (source: torchft's ``Manager``).

    Args:
        replica: the number of this group.
        lighthouse: the address of the process that knows which groups are alive, such as ``"http://host:29510"``.
        timeout: of everything that waits for another group; for the lighthouse, which waits for late groups itself,
            twice as long.
        state: gives what a group that joins needs, in plain data and tensors that no one changes afterwards.
        load: takes it.

    Raises:
        ReplicaError: there is no lighthouse at this address.
    """

    def __init__(
        self,
        replica: int,
        lighthouse: str,
        timeout: timedelta,
        state: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any]], None],
    ) -> None:
        torchft = _torchft.torchft()
        self.lighthouse, self._patience = lighthouse, 2 * timeout
        # torchft waits without end, and without a word, for one that no one has made.
        self._store = dist.TCPStore(socket.gethostname(), 0, is_master=True, wait_for_workers=False, timeout=timeout)
        self._connections = torchft.ProcessGroupGloo(timeout=timeout)
        try:
            self._manager = torchft.Manager(
                pg=self._connections,
                load_state_dict=load,
                state_dict=state,
                min_replica_size=1,  # the lighthouse knows how many a run needs
                use_async_quorum=False,  # who joins has the state of the others before its forward pass
                timeout=timeout,
                quorum_timeout=self._patience,
                connect_timeout=self._patience,
                rank=0,
                world_size=1,
                store_addr=socket.gethostname(),
                store_port=self._store.port,
                lighthouse_addr=lighthouse,
                replica_id=f"group_{replica}",
                checkpoint_transport=_torchft.transport(timeout),
                max_retries=RETRIES,
            )
        except Exception as error:
            raise ReplicaError(self._no_answer()) from error

    def begin(self) -> int:
        """Meet the groups that are alive, before the first forward pass of a step; one that lags behind takes the state
        of another one. Returns how many they are.

        Raises:
            ReplicaError: the lighthouse does not answer, or waits for more groups than there are.
        """
        try:
            self._manager.start_quorum()
        except ReplicaError:
            raise
        except Exception as error:
            raise ReplicaError(self._no_answer()) from error
        return self._manager.num_participants()

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient the mean over the groups that are alive. One that no group has stays ``None``; what only
        some have is zero on the others. After an error nothing is sent, and the step is lost."""
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        flat: dict[torch.dtype, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            own = [p for p in parameters if p.dtype == dtype]
            flat[dtype] = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in own])
        works = [self._manager.allreduce(tensor) for tensor in (has, *flat.values())]
        for work in works:
            work.wait()
        begin = dict.fromkeys(flat, 0)
        for p, some in zip(parameters, has.tolist(), strict=True):
            end = begin[p.dtype] + p.numel()
            if some:
                p.grad = flat[p.dtype][begin[p.dtype] : end].view_as(p)
            begin[p.dtype] = end

    def commits(self) -> bool:
        """Whether the averages of this step are whole. Once a step.

        Raises:
            ReplicaError: so many steps in a row were lost that going on would be no training.
        """
        try:
            return self._manager.should_commit()
        except Exception as error:
            raise ReplicaError(
                f"torchft gave up on a step: {error}. Look at the first error above, and at whether the hosts of all "
                "groups reach each other; a group that ends is replaced by starting its command again"
            ) from error

    def leave(self, together: bool) -> None:
        """End the talk. ``together``: all groups end after this step, so wait until each has its averages."""
        if together and self._manager.errored() is None:
            self._manager.allreduce(torch.zeros(1)).wait()
        self._connections.shutdown()
        self._manager.shutdown()

    def _no_answer(self) -> str:
        return (
            f"the lighthouse at {self.lighthouse} did not bring this group together with others in "
            f"{self._patience.total_seconds():g} s: start `torchft_lighthouse --min_replicas <n>` there before the "
            "groups, start at least so many groups, and give all the same address (lighthouse=..., or "
            "TORCHFT_LIGHTHOUSE); a longer timeout=... waits longer"
        )
