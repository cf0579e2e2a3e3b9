"""Trials on a Ray cluster: the same ranks, forked from warm servers that Ray actors have started on its nodes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import ray
from ray.exceptions import RayError

from lightning_bharat.cluster import ray_worker
from lightning_bharat.cluster.warm_host import COMMAND, Program
from lightning_bharat.cluster.warm_job import Answer
from lightning_bharat.tuning.engine import PRELOAD_OF_TRIALS, Job, Objective, call_of_trial
from lightning_bharat.tuning.ray_job import RayJob
from lightning_bharat.tuning.slots import Slot, cuda_devices, slots
from lightning_bharat.tuning.trial_run import Orders

_END_SECONDS = 8.0


@dataclass
class _Worker:
    """An actor, and where it is, which is known once Ray has found it a place."""

    actor: Any
    place: Any

    def where(self) -> tuple[str | None, bool, list[str]]:
        with suppress(RayError):
            if ray.wait([self.place], timeout=0)[0]:
                return ray.get(self.place)
        return None, False, []


class RayEngine:
    """Trials on the nodes of a Ray cluster, one at a time for each of its actors.

    Args:
        objective: a person's function; ``None``: a trial is a fit of the study's config.
        ranks: of a trial, by its values and what it has.
        on_cpu: whether trials use no other device.
        say: told once how large the cluster is.
        address: of the cluster, as ``ray.init`` takes it: by default ``RAY_ADDRESS``, else the cluster that was started
            on this host, else a new one on this host, which ends with the study.
        num_cpus: of each worker; by default its share of this host's cores, or of the cluster's if that is less.
        num_gpus: of each worker; by default its share of this host's.
    """

    def __init__(
        self,
        objective: Objective | None,
        ranks: Callable[[Orders, Slot], int],
        on_cpu: bool,
        say: Callable[[str], None],
        address: str | None = None,
        num_cpus: float | None = None,
        num_gpus: int | None = None,
    ) -> None:
        self._objective, self._ranks, self._on_cpu, self._say = objective, ranks, on_cpu, say
        self._address, self._cpus, self._gpus = address, num_cpus, num_gpus
        self._slots: list[Slot] = []
        self._workers: dict[int, _Worker] = {}
        self._of: WeakKeyDictionary[Job, _Worker] = WeakKeyDictionary()  # also of one that has died
        self._share = 1.0  # of the cluster's CPUs, for each worker
        self._ours = False

    def slots(self, workers: int) -> list[Slot]:
        """This host's cores and devices, divided evenly; of devices as many as were asked of Ray."""
        if self._gpus is not None:
            devices = [str(number) for number in range(workers * self._gpus)]
        else:
            devices = [] if self._on_cpu else cuda_devices()
        self._slots = slots(workers, devices)
        return self._slots

    def warm_up(self) -> None:
        """Connect to the cluster and let workers begin their imports.

        Raises:
            ConnectionError: there is no cluster at the address.
        """
        if not ray.is_initialized():
            ray.init(address=self._address, include_dashboard=False, logging_level="WARNING")
            self._ours = True
        ray.cloudpickle.register_pickle_by_value(ray_worker)
        self._look_at_cluster()
        for slot in self._slots:
            self._worker(slot)

    def start(self, orders: Orders, slot: Slot, answer: Answer) -> Job:
        """Start a trial's ranks, as soon as Ray has a place for them; what they write stays in its folder."""
        ranks, worker = self._ranks(orders, slot), self._worker(slot)
        env = {"OMP_NUM_THREADS": str(max(1, int(self._cpus_of(slot)) // ranks))}
        # Which cores these are depends on the node: the worker has seen to it.
        call = call_of_trial(replace(orders, cores=()), self._objective)
        job = RayJob(worker.actor, call, ranks, env, answer, orders.folder, lambda: self._drop(slot.number))
        self._of[job] = worker
        return job

    def where(self, job: Job, slot: Slot) -> dict[str, Any]:
        """The node's name; ``None`` while Ray has no place for the worker."""
        host, here, devices = self._of[job].where()
        return {"host": host, "cores": slot.cores if here else (), "devices": devices, "ranks": job.ranks}

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        ends = [worker.actor.end.remote() for worker in self._workers.values() if worker.where()[0]]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=_END_SECONDS)
        for number in list(self._workers):
            self._drop(number)
        if self._ours:
            ray.shutdown()

    def _look_at_cluster(self) -> None:
        nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        self._share = sum(nodes) / max(1, len(self._slots))
        self._say(f"trials run on Ray: {len(nodes)} node{'s' * (len(nodes) != 1)}, {sum(nodes):g} CPUs")
        wanted = max(map(self._cpus_of, self._slots))
        if wanted > max(nodes):
            self._say(f"no node of the Ray cluster has {wanted:g} CPUs for a worker now: trials wait for one")

    def _cpus_of(self, slot: Slot) -> float:
        if self._cpus is not None:
            return self._cpus
        share = min(len(slot.cores), self._share)
        return int(share) if share > 1 else share

    def _worker(self, slot: Slot) -> _Worker:
        if slot.number not in self._workers:
            gpus = len(slot.devices) if self._gpus is None else self._gpus
            actor_class = ray.remote(ray_worker.RayWorker).options(
                num_cpus=self._cpus_of(slot), num_gpus=gpus, max_concurrency=2
            )
            program = Program.own(PRELOAD_OF_TRIALS)
            actor = actor_class.remote(
                COMMAND,
                pickle.dumps((program, ())),
                pickle.dumps((program, slot.cores if self._cpus is None else ())),
                ray_worker.boot(),
                os.getcwd(),
                os.environ.get("PYTHONPATH"),
            )
            self._workers[slot.number] = _Worker(actor, actor.place.remote())
        return self._workers[slot.number]

    def _drop(self, number: int) -> None:
        """It may live, and not be heard: its ranks must not go on."""
        ray.kill(self._workers.pop(number).actor)
