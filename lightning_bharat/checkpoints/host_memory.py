"""Checkpoints in the memory of hosts: each host has the files of its own ranks and those of the host before it.

A host that is lost takes no file with it that no other host has, as long as the one behind it stays. Files that a rank
needs and its host lacks are fetched when they are read (Gemini keeps checkpoints in peers' memory likewise: Wang et
al., SOSP 2023).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from lightning_bharat.checkpoints.digest import check_digest
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.file_server import ask, pull

VARIABLE = "BHARAT_HOST_MEMORY"  # set by `bharat launch` for its ranks
ELSEWHERE = ".elsewhere.json"  # beside the checkpoints: which hosts have which files
PART = ".part"


@dataclass(frozen=True)
class Hosts:
    """The hosts of an attempt, in order of their numbers.

    Attributes:
        here: number of this one.
        folders: in which each has its checkpoints.
        addresses: where each serves its files, "host:port"; "" with one host, which asks nobody.
        token: that they ask for.
    """

    here: int = 0
    folders: tuple[str, ...] = field(default_factory=tuple)
    addresses: tuple[str, ...] = field(default_factory=tuple)
    token: str = ""

    @property
    def folder(self) -> Path:
        """Of this host."""
        return Path(self.folders[self.here])

    @property
    def before(self) -> int:
        """The host whose files this one keeps as well."""
        return (self.here - 1) % len(self.folders)

    def to_json(self) -> str:
        """For the environment of ranks."""
        return json.dumps(asdict(self))

    def fetch(self, host: int, name: str, file: str, target: Path) -> None:
        """Get a file of the checkpoint ``name`` from ``host``; it appears when it is whole.

        Raises:
            CheckpointError: it could not be had.
        """
        part = self.folder / f".{uuid.uuid4().hex[:8]}{PART}"
        try:
            pull(self.addresses[host], self.token, f"{name}/{file}", part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def hosts() -> Hosts | None:
    """Those that `bharat launch` has told this rank of; ``None``: it did not start this process."""
    said = os.environ.get(VARIABLE)
    return _parsed(said) if said else None


@lru_cache(maxsize=1)
def _parsed(said: str) -> Hosts:
    content = json.loads(said)
    folders, addresses = (tuple(content[name]) for name in ("folders", "addresses"))
    return Hosts(content["here"], folders, addresses, content["token"])


def here(path: Path) -> Path:
    """``path``, which a rank of another host has named, as this host names it."""
    known = hosts()
    inside = known is not None and str(path.parent) in known.folders
    return known.folder / path.name if known is not None and inside else path


def elsewhere(path: Path) -> Iterator[int]:
    """The hosts that have the file ``path``, which is not here."""
    known = hosts()
    if known is None or path.parent.parent != known.folder:
        return
    with suppress(OSError, ValueError, AttributeError):
        yield from json.loads((known.folder / ELSEWHERE).read_text()).get(path.parent.name, {}).get(path.name, [])


def is_elsewhere(path: Path) -> bool:
    """Whether another host has the file ``path``."""
    return any(True for _ in elsewhere(path))


def fetch(path: Path) -> None:
    """Get the file ``path`` from a host that has it, if it is not here; where none has it, nothing is done.

    Raises:
        CheckpointError: none of those that have it gives it; with the last one's reason.
    """
    if path.exists():
        return
    known, error = hosts(), None
    for host in elsewhere(path):
        assert known is not None
        try:
            return known.fetch(host, path.parent.name, path.name, path)
        except CheckpointError as raised:
            error = raised
    if error is not None:
        raise error


def check(path: Path, digest: str) -> None:
    """Compare the file ``path`` with what was written, on the host that has it.

    Raises:
        CheckpointError: it has changed, or can't be read.
    """
    known = hosts()
    for host in () if path.exists() else elsewhere(path):
        assert known is not None
        said = ask(known.addresses[host], known.token, f"{path.parent.name}/{path.name}?digest")
        if said.get("digest") == digest:
            return
    check_digest(path, digest)
