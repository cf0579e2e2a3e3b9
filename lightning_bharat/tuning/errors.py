"""What tuning says when it can't go on."""

from __future__ import annotations


class StorageError(RuntimeError):
    """A study's storage can't be opened, read or written; says which one and what to do."""
