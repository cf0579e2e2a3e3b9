"""A copy of tensors in host memory, from which they can be written while training changes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_bharat.checkpoints.safetensors_file import Entry

_ALIGNED = 64  # bytes: a cache line, and no less than any type asks for


class HostMemory:
    """Memory for one snapshot, kept for the next: new memory costs a page fault for each 4 KB, which is more than the
    copy itself. It is pinned where values come from a GPU, which then writes it without the processor's help.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, entries: Sequence[Entry]) -> list[Entry]:
        """``entries`` with the values that they have now. The last copy is overwritten."""
        sources = [entry.read().detach() for entry in entries]
        devices = {source.device for source in sources if source.device.type != "cpu"}
        self._make_room(sum(map(_room, entries)), bool(devices))
        copies, begin = [], 0
        for entry, source in zip(entries, sources, strict=True):
            target = self._bytes[begin : begin + entry.nbytes].view(entry.dtype).view(entry.shape)
            target.copy_(source, non_blocking=True)
            copies.append(replace(entry, read=partial(_itself, target)))
            begin += _room(entry)
        for device in devices:
            torch.get_device_module(device).current_stream(device).synchronize()
        return copies

    def _make_room(self, size: int, pinned: bool) -> None:
        if self._bytes.numel() < size or (pinned and not self._bytes.is_pinned()):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # first free what there is
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def _room(entry: Entry) -> int:
    return -(-entry.nbytes // _ALIGNED) * _ALIGNED


def _itself(tensor: Tensor) -> Tensor:
    return tensor
