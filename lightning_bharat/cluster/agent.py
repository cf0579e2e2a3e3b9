"""torchelastic's agent with warm ranks, a watch of its own, and restarts that know what failed.

Of torchelastic it keeps the rendezvous, the ranks' numbers, the exit barrier and the handling of signals. What differs:

- Each attempt gets a store of its own. torchelastic keeps one over restarts, in which the next attempt's ranks find
  the addresses of the last one's (pytorch #135712, #167288), and as often as not connect to the dead.
- Ranks of a failed attempt are killed at once. torchelastic sends SIGTERM and waits 30 s for those that hang.
- A rank that has stopped or hangs is a failure, too (:mod:`~lightning_bharat.cluster.watch`).
- Whether to start again is decided by :mod:`~lightning_bharat.cluster.restart`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

from lightning_bharat.checkpoints import host_memory
from lightning_bharat.cluster import inventory
from lightning_bharat.cluster.bad_nodes import BadNodes
from lightning_bharat.cluster.failure import Failure, of_ends
from lightning_bharat.cluster.host_memory import LaunchMemory, reachable_address
from lightning_bharat.cluster.hosts import Hosts
from lightning_bharat.cluster.meeting import Meeting, settle
from lightning_bharat.cluster.node import Node, to_text
from lightning_bharat.cluster.rank_script import Script
from lightning_bharat.cluster.record import Record
from lightning_bharat.cluster.restart import Decision, RestartPolicy
from lightning_bharat.cluster.warm_ranks import Bench, WarmRanks
from lightning_bharat.cluster.watch import Limits, Watch
from lightning_bharat.cluster.worker_environment import named, variables

# Seconds in which a rank may turn out to be why others have lost a connection.
_PATIENCE = 5.0
_MEETINGS = 3  # that are tried before a host gives up


class WarmAgent(LocalElasticAgent):
    """Runs a script on this host's ranks until it ends well, or fails for good.

    Args:
        spec: torchelastic's: ranks on this host, rendezvous, …; its ``max_restarts`` is the policy's limit.
        bench: forks ranks.
        script: what they run.
        limits: after which a rank is taken for lost.
        record: of the run's events.
        logs_specs, prefix, shutdown_timeout: as torchrun's options.
        memory: of this host, for checkpoints.
        fewest: hosts with which the run goes on.

    Attributes:
        leaves: whether this host has left the run to the others.
        failure: what ended the run, if it failed.
        decision: why it was not started again.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        bench: Bench,
        script: Script,
        limits: Limits,
        record: Record,
        logs_specs: LogsSpecs,
        memory: LaunchMemory,
        prefix: str | None = None,
        shutdown_timeout: int = 30,
        fewest: int = 1,
    ) -> None:
        super().__init__(spec, logs_specs, shutdown_timeout=shutdown_timeout)
        self._logs, self._prefix, self._last_words = logs_specs, prefix or "", shutdown_timeout
        self._bench, self._script, self._limits, self._record = bench, script, limits, record
        self._memory, self._variables = memory, dict[str, str]()
        self._policy = RestartPolicy(spec.max_restarts)
        self._look_for = spec.monitor_interval
        spec.monitor_interval = 0  # its loop sleeps so long between two looks; ours end as soon as a rank does
        self._attempt = -1
        self._met: Meeting | None = None  # it keeps this attempt's store, if this host serves that
        self._names: list[str] = []
        self._ranks: WarmRanks | None = None
        self._watch: Watch | None = None
        self._hosts: Hosts | None = None
        self._trains, self._victims_since = False, 0.0
        self._bad_nodes, self._fewest = BadNodes(os.uname().nodename), fewest
        self.leaves = False
        self.failure: Failure | None = None
        self.decision: Decision | None = None

    # ---- starting

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        for left in reversed(range(_MEETINGS)):
            try:
                super()._rendezvous(worker_group)
                self._settle(worker_group)
                return
            except dist.DistStoreError:  # a host was lost after all had met: those that are left meet again
                if not left:
                    raise

    def _settle(self, worker_group: WorkerGroup) -> None:
        group: Any = worker_group
        here, size, own = group.group_rank, group.group_world_size, group.spec.local_addr
        met = settle(group, self._attempt + 1, Node.read(group.spec.local_world_size, self._record.place))
        self._met, self._attempt, group.master_addr, group.master_port = met, met.attempt, met.address, met.port
        self._hosts = Hosts(met.address, met.port, here, size)
        attempt = dist.PrefixStore(f"bharat/{self._attempt}", group.store)
        own = own or reachable_address(met.address, met.port)
        memory = self._memory.meet(attempt, here, size, own).to_json()
        self._variables = {host_memory.VARIABLE: memory, inventory.VARIABLE: to_text(met.nodes)}
        names = [node.name for node in met.nodes]
        if names != self._names and here == 0:
            for words in inventory.warnings(met.nodes):
                print(f"bharat launch: {words}", file=sys.stderr, flush=True)
        self._names = names

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        assert self._met is not None
        workers, here = worker_group.workers, worker_group.group_rank or 0
        envs = {w.local_rank: variables(worker_group, w, self._attempt) | self._variables for w in workers}
        numbers = {worker.local_rank: worker.global_rank for worker in workers}
        prefixes = {worker.local_rank: named(self._prefix, worker_group, worker) for worker in workers}
        self._record.note(
            "start",
            attempt=self._attempt,
            ranks=workers[0].world_size,
            node=here,
            nodes=len(self._met.nodes),
            **self._met.nodes[here].facts(),
        )
        self._ranks = WarmRanks(self._bench, self._script, envs, numbers, self._logs, prefixes, worker_group.spec.role)
        self._pcontext = self._ranks
        self._trains, self._victims_since = False, 0.0
        self._ranks.start()
        self._watch = Watch(self._ranks.running, self._limits)
        return self._ranks.pids()

    # ---- watching

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self._ranks is not None and self._hosts is not None
        self._ranks.look(self._look_for)
        self._note_progress()
        if (failure := self._failed()) is not None:
            self._decide(failure)
            return RunResult(WorkerState.FAILED, failures=self._ranks.failures(failure.ranks))
        if self._ranks.running:
            return RunResult(WorkerState.HEALTHY)
        self._hosts.stop()
        self._record.settle(self._ranks.run_folder())
        self._record.note(
            "end", ok=True, attempt=self._attempt, step=self._ranks.reached(), node=worker_group.group_rank
        )
        return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})

    def _note_progress(self) -> None:
        """The first step of an attempt is an event, and the time to let the next attempt's ranks wait."""
        assert self._ranks is not None
        if self._record.folder is None:
            self._record.settle(self._ranks.run_folder())
        if self._trains:
            return
        pulses = self._ranks.pulses().values()
        if all(pulse.first for pulse in pulses):
            self._trains = True
            # On the wall clock, as other events are.
            at = time.time() - (time.monotonic() - max(pulse.first for pulse in pulses))
            began = min(pulse.began for pulse in pulses)
            self._record.note("training", time=at, attempt=self._attempt, step=began)
            self._bench.fill(len(pulses))

    def _failed(self) -> Failure | None:
        assert self._ranks is not None and self._watch is not None and self._hosts is not None
        failure = of_ends(self._ranks.ends)
        if failure is None and self._hosts.lost:
            return Failure("lost connection", (), self._hosts.lost, self._ranks.reached())
        if failure is None:
            return self._watch.look()
        if failure.ranks or not self._ranks.running:
            return failure
        now = time.monotonic()  # only consequences are seen: the cause is about to show
        self._victims_since = self._victims_since or now
        return self._watch.look() or (failure if now - self._victims_since > _PATIENCE else None)

    def _decide(self, failure: Failure) -> None:
        assert self._ranks is not None
        reached = self._ranks.reached()
        self._record.settle(self._ranks.run_folder())
        self.failure = failure
        self.decision = self._policy.decide(failure, reached)
        group = self.get_worker_group()
        spare = (group.group_world_size or 1) > self._fewest
        if spare and (bad := self._bad_nodes.judge(failure, self._record.place)):
            self.decision, self.leaves = Decision(False, 0, bad), True
        self._remaining_restarts = int(self.decision.again)
        report = self._record.report(f"attempt_{self._attempt}_{os.uname().nodename}", failure.report)
        self._record.note(
            "failure",
            attempt=self._attempt,
            cause=failure.cause,
            ranks=list(failure.ranks),
            words=failure.words,
            step=reached,
            progress=self._ranks.got_on(),
            report=report,
        )
        self._tell(failure, report)

    def _tell(self, failure: Failure, report: str) -> None:
        assert self.decision is not None
        then = "ends" if not self.decision.again else f"restarts in {self.decision.wait:g} s"
        what = failure.words if failure.ranks else f"another host's rank failed ({failure.words})"
        print(f"bharat launch: {what}; {then}: {self.decision.why}", file=sys.stderr, flush=True)
        if report and failure.cause in ("stopped", "hung"):
            print(f"bharat launch: stacks of all ranks are in {report}", file=sys.stderr, flush=True)

    # ---- stopping

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            self._record.note("restart", attempt=self._attempt, wait=0.0, why="another host joins, or starts again")
        else:
            assert self.decision is not None
            self._stop_workers(worker_group)
            self._record.note("restart", attempt=self._attempt, wait=self.decision.wait, why=self.decision.why)
            time.sleep(self.decision.wait)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # Where all is well another host comes or comes back, and there may be something to save.
        well = worker_group.state == WorkerState.HEALTHY
        if self._hosts is not None:
            self._hosts.stop()
        if self._ranks is not None:
            self._ranks.close(signal.SIGTERM if well else signal.SIGKILL, self._last_words)
