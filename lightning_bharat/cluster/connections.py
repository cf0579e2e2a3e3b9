"""What a rank says when another one is gone."""

from __future__ import annotations

import torch.distributed as dist

# What gloo's, NCCL's and the kernel's errors have in common when a rank at the other end is gone.
_BROKEN = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


def is_lost_connection(error: BaseException) -> bool:
    """Whether ``error`` may be but the consequence of another rank's end."""
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)
