"""A copy of tensors in host memory, from which they can be written while training changes them.

What only an optimizer's step changes need not be copied before training goes on: it stays as it is through the next
forward and backward pass, beside which it is copied (lazy copies: Maurya et al., "DataStates-LLM: Lazy Asynchronous
Checkpointing for Large Language Models", HPDC 2024). The step waits for the copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.safetensors_file import Entry

Later = Callable[[Tensor], Tensor | None]

_ALIGNED = 64  # bytes: a cache line, and no less than any type asks for


class _Left(NamedTuple):
    """What is to be copied; ``owner`` counts changes of it in ``version``."""

    name: str
    source: Tensor
    target: Tensor
    owner: Tensor
    version: int


class Snapshot:
    """A copy, of which a part may still be to be made.

    Attributes:
        entries: what was copied, with its values in host memory; to be read after :meth:`complete`.
        was_changed: something had been changed before it was copied.
    """

    was_changed = False

    def __init__(self, entries: list[Entry], left: Sequence[_Left] = ()) -> None:
        self.entries = entries
        self._left = list(left)
        self._ready = [_event(device) for device in {one.source.device for one in left}]
        self._done = threading.Event()
        if not left:
            self._done.set()

    @torch.no_grad()
    def complete(self) -> None:
        """Copy what is left; in any thread.

        Raises:
            CheckpointError: it has been changed since: by other code than a step of the trainer's optimizers.
        """
        try:
            with _beside(self._ready):
                for one in self._left:
                    one.target.copy_(one.source, non_blocking=True)
            changed = [one.name for one in self._left if one.owner._version != one.version]
            if changed:
                self.was_changed = True
                raise CheckpointError(
                    f"{changed[0]} was changed before it had been copied, by other code than a step of an optimizer "
                    "under the trainer; the next saves copy all before training goes on"
                )
        finally:
            self._left = []
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Wait until it is complete, for ``seconds`` at most; returns whether it is."""
        return self._done.wait(seconds)


class HostMemory:
    """Memory for one snapshot, kept for the next: new memory costs a page fault for each 4 KB, which is more than the
    copy itself. It is pinned where values come from a GPU, which then writes it without the processor's help.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._shapes: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def copy(self, entries: Sequence[Entry], later: Later = lambda tensor: None) -> Snapshot:
        """``entries`` with the values that they have now. The last copy is overwritten.

        Args:
            later: for a tensor that stays as it is until the snapshot is complete the one that counts its changes
                (itself, or the ``DTensor`` that it is a part of: what is done to that leaves no trace in its parts).
        """
        sources = [entry.read().detach() for entry in entries]
        devices = {source.device for source in sources if source.device.type != "cpu"}
        self._make_room(entries, bool(devices))
        copies, left = [], []
        for entry, source, target in zip(entries, sources, self._copies, strict=True):
            owner = later(source)
            if owner is not None:
                left.append(_Left(entry.key, source, target, owner, owner._version))
            else:
                target.copy_(source, non_blocking=True)
            copies.append(Entry(entry.key, entry.dtype, entry.shape, partial(_itself, target), entry.frozen))
        for device in devices:
            torch.get_device_module(device).current_stream(device).synchronize()
        return Snapshot(copies, left)

    def _make_room(self, entries: Sequence[Entry], pinned: bool) -> None:
        shapes = [(entry.dtype, entry.shape) for entry in entries]
        fits = not pinned or self._bytes.is_pinned()
        if fits and shapes == self._shapes:
            return
        self._shapes, self._copies, size, begin = [], [], sum(map(_room, entries)), 0
        if self._bytes.numel() < size or not fits:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # first free what there is
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for entry in entries:
            part = self._bytes[begin : begin + entry.nbytes]
            self._copies.append(part.view(entry.dtype).view(entry.shape))
            begin += _room(entry)
        self._shapes = shapes


def _room(entry: Entry) -> int:
    return -(-entry.nbytes // _ALIGNED) * _ALIGNED


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _event(device: torch.device) -> Any:
    """When what has been asked of ``device`` so far is done; ``None`` for the CPU, where it is."""
    if device.type == "cpu":
        return None
    event = torch.get_device_module(device).Event()
    event.record(torch.get_device_module(device).current_stream(device))
    return device, event


@contextmanager
def _beside(ready: Sequence[Any]) -> Iterator[None]:
    """In here copies run beside the work of GPUs, after what had been asked of them; they are done when it is left."""
    streams = []
    with ExitStack() as stack:
        for device, event in filter(None, ready):
            module = torch.get_device_module(device)
            streams.append(module.Stream(device))
            streams[-1].wait_event(event)
            stack.enter_context(module.stream(streams[-1]))
        yield
    for stream in streams:
        stream.synchronize()
