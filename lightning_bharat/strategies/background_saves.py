"""When a strategy's checkpoints are written: at once, or beside training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_bharat.checkpoints import host_memory
from lightning_bharat.checkpoints.background import Background, InStore
from lightning_bharat.checkpoints.host_saving import HostSaving
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.saving import InGroup, Saver, Saving
from lightning_bharat.strategies._torch import default_store
from lightning_bharat.strategies.collectives import highest_of

_runs = count()


class BackgroundSaves:
    """The saves of a strategy that has the attributes ``watch`` and ``options``.

    Attributes:
        writer: runs what has been put off. One save at a time: the next one waits for it.
        saver: makes them.
        last: the save that was begun last.
        waited: seconds that steps have waited for its copy.
        puts_off: whether a save that comes now does not wait for its end (:meth:`put_off`).
    """

    def __init__(self, strategy: Any) -> None:
        self.writer = Background()
        self.last: Saving | None = None
        self.waited = 0.0
        self.saver, self._strategy = Saver(), strategy
        self._ranks: InStore | None = None
        self.puts_off = self._is_changed = False

    def copied(self) -> None:
        """Wait until the last save has its copy. To be called before anything changes weights."""
        if self.last is None or self.last.snapshot.wait(0):
            return
        began = time.perf_counter()
        while not self.last.snapshot.wait(0.5) and not self.writer.is_idle:
            pass
        self.waited += time.perf_counter() - began

    def before_change(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, a forward and backward pass that a change of the weights follows, which waits for the copy."""

        def then_copied() -> Any:
            out = closure()
            self.copied()
            return out

        return then_copied

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """In here a save returns when what may change has been copied to host memory; ``writer`` does the rest. What
        optimizers step on is copied beside the next forward and backward pass, and the step waits for it.

        A save to the folder of ``host_memory.hosts()`` goes to that of each host.
        """
        self.puts_off = True
        try:
            yield
        finally:
            self.puts_off = False

    def save(self, path: Path, checkpoint: dict[str, Any], manifest: Manifest) -> None:
        """Save, or begin to. All ranks must call it.

        Raises:
            CheckpointError: on every rank with the same words; of what is put off, ``writer`` has the error.
        """
        self.writer.wait()
        highest = partial(highest_of, self._strategy)
        if not self.puts_off:
            self.saver.begin(path, checkpoint, manifest, highest=highest).write(InGroup())
            return
        if self._ranks is None:
            self._ranks = self._meet()
        self.waited, ranks = 0.0, self._ranks
        steady = {} if self._is_changed else _stepped_on(self._strategy.optimizers)
        later = lambda part: steady.get(part.untyped_storage().data_ptr())  # noqa: E731
        self.last = self.saver.begin(path, checkpoint, manifest, copy=True, later=later, highest=highest)
        hosts = host_memory.hosts()
        if hosts is not None and str(path.parent) in hosts.folders:
            self.last = HostSaving.of(self.last, hosts)
        self.writer.do(lambda saving=self.last: self._write(saving, ranks))  # type: ignore[misc]

    def _write(self, saving: Saving, ranks: InStore) -> None:
        try:
            saving.write(ranks)
        finally:
            self._is_changed = self._is_changed or saving.snapshot.was_changed

    def _meet(self) -> InStore:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return InStore(dist.HashStore(), 0, 1)
        # A process may run several trainers, and torchelastic's restarts share one store.
        prefix = f"saves/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        store = dist.PrefixStore(prefix, default_store())
        patience = self._strategy.options.timeout
        return InStore(
            store, dist.get_rank(), dist.get_world_size(), self._lost, patience.total_seconds() if patience else 1800
        )

    def _lost(self) -> str:
        first = self._strategy.watch and self._strategy.watch.first
        return str(first) if first and first.is_gone else ""


def _stepped_on(optimizers: Iterable[Optimizer]) -> dict[int, Tensor]:
    """Parameters and states of ``optimizers``, by where they are on this rank."""
    tensors = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    tensors += [t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
    found = {}
    with torch.no_grad():
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.numel():
                found[local.untyped_storage().data_ptr()] = tensor
    return found
