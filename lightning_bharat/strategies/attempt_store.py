"""Where the ranks of an attempt meet under torchrun, apart from those of the attempts before."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist


def store_of_attempt(timeout: timedelta | None) -> dist.Store | None:
    """A part of the launcher's store in which no earlier attempt has written; ``None`` where torch's own way is right.

    torchrun keeps one store over restarts, and a rank that starts again may read a dead one's address in it: it is
    refused, or waits for the whole time-out (pytorch #135712, #167288). With several hosts the count of restarts can't
    be used, since each host counts its own; ``bharat launch`` gives each attempt a new store.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if not shared or count == "0":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if timeout is not None:
        store.set_timeout(timeout)
    return dist.PrefixStore(f"attempt/{count}", store)
