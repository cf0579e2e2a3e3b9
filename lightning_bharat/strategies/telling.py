"""What one rank tells the others of a group: in one message where it is short, as numbers of a step are."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SHORT = 4096  # bytes of the message that always goes
_HEAD = 8  # of them, for the length


def tell(value: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """``value`` of rank ``source`` on all ranks of ``group``; its tensors arrive on the CPU.

    (``dist.broadcast_object_list`` always sends two messages, and ranks wait for each.)

    Args:
        value: anything that can be pickled; read on ``source`` alone.
        source: a rank of ``group``, counted in it.
        device: on which messages travel.
    """
    words = _pickled(value) if group.rank() == source else b""
    first = _sent(len(words).to_bytes(_HEAD, "big") + words[: SHORT - _HEAD], SHORT, source, group, device)
    length = int.from_bytes(first[:_HEAD], "big")
    if length > SHORT - _HEAD:
        first = first[:_HEAD] + _sent(words, length, source, group, device)
    if group.rank() == source:
        return value
    return pickle.loads(first[_HEAD : _HEAD + length])  # a rank of our own wrote it, in this run


def _sent(words: bytes, length: int, source: int, group: dist.ProcessGroup, device: torch.device) -> bytes:
    """``length`` bytes, of which ``words`` on ``source`` are the first."""
    message = torch.frombuffer(bytearray(words.ljust(length)), dtype=torch.uint8).to(device)
    dist.broadcast(message, group_src=source, group=group)
    return message.cpu().numpy().tobytes()


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _OnCPU(file).dump(value)
    return file.getvalue()


class _OnCPU(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        return (_same, (obj.cpu(),)) if type(obj) is Tensor and not obj.is_cpu else NotImplemented


def _same(tensor: Tensor) -> Tensor:
    return tensor
