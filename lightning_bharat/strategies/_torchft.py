"""All of torchft's private names that this package touches; test_private_names.py fails when one moves."""

from __future__ import annotations

from datetime import timedelta
from types import ModuleType
from typing import Any
from urllib.request import urlopen


def torchft() -> ModuleType:
    """torchft, imported.

    Raises:
        ModuleNotFoundError: it is not installed, or what it exports its records by; names the extra.
    """
    try:
        import torchft
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("torchft", "opentelemetry"):
            raise
        raise ModuleNotFoundError(
            'strategy="bharat_torchft" needs torchft; write: pip install "lightning-bharat[torchft]"',
            name=error.name,
        ) from None
    return torchft


def transport(timeout: timedelta) -> Any:
    """torchft's transport of a live process's state to one that joins, which can't run code: torchft's own unpickles
    whatever the other end sends."""
    from torch.distributed._serialization import _streaming_load
    from torchft.checkpointing import HTTPTransport

    class Transport(HTTPTransport):
        @classmethod
        def _load_from_address(cls, address: str, timeout: timedelta) -> object:
            with urlopen(address, timeout=timeout.total_seconds()) as stream:
                return _streaming_load(stream, weights_only=True)

    return Transport(timeout=timeout, num_chunks=0)
