"""What a rank of ``bharat launch`` tells its launcher of the exception by which it ends."""

from __future__ import annotations

import json
from contextlib import suppress
from multiprocessing.connection import Connection

_channel: Connection | None = None


def begin(channel: Connection) -> None:
    """Let ``channel`` lead to the launcher."""
    global _channel
    _channel = channel


def say(kind: str, message: str, traceback: str = "", is_victim: bool = False) -> None:
    """Tell it; the first words count. Outside of ``bharat launch`` nothing is done.

    Args:
        kind: of the exception, by name.
        message, traceback: of it.
        is_victim: whether it is but the consequence of another rank's end.
    """
    words = {"kind": kind, "message": message, "traceback": traceback, "is_victim": is_victim}
    with suppress(OSError):  # the launcher is gone
        if _channel is not None:
            _channel.send_bytes(json.dumps(words).encode())
