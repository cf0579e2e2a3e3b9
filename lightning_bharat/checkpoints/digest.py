"""Digests of files: XXH3, 128 bits, against damage. (Not against an enemy, who can write a digest as well.)"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from lightning_bharat.checkpoints.errors import CheckpointError

DIGEST = "xxh3"  # its key in the manifest
_AT_ONCE = 2**20


def new_digest() -> xxhash.xxh3_128:
    """An empty one, to be fed in pieces."""
    return xxhash.xxh3_128()


def digest_of(path: Path) -> str:
    """Of the whole file, read piece by piece."""
    digest, piece = new_digest(), memoryview(bytearray(_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def read_back(path: Path, expected: str) -> None:
    """Compare what lies on the disk with what was written: the file is read again, and not from the page cache.

    Raises:
        CheckpointError: it is another content.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # it has been synced: the cache lets go of it
    finally:
        os.close(descriptor)
    check_digest(path, expected)


def check_digest(path: Path, expected: str) -> None:
    """Compare a file with what was written.

    Raises:
        CheckpointError: it is missing, can't be read, or has changed.
    """
    try:
        found = digest_of(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is an incomplete copy of a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: its bytes are not those that were written ({DIGEST} {found}, not {expected}). Use "
            "another checkpoint or a good copy of this file; bharat checkpoint verify names all damaged files"
        )
