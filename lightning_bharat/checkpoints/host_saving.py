"""A save to the memory of hosts: each host writes the files of its ranks and fetches those of the host before it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.document import STATE
from lightning_bharat.checkpoints.host_memory import Hosts, here
from lightning_bharat.checkpoints.index import INDEX
from lightning_bharat.checkpoints.manifest import COMMIT, MANIFEST, Manifest
from lightning_bharat.checkpoints.saving import Ranks, Saving

SMALL = (STATE, INDEX, MANIFEST, COMMIT)  # what every host has


@dataclass(frozen=True)
class HostSaving(Saving):
    """A save that has begun, as :class:`Saving`; what is older goes from all hosts when all of them have it.

    Attributes:
        hosts: of this attempt.
    """

    hosts: Hosts = field(default_factory=Hosts)

    @classmethod
    def of(cls, saving: Saving, hosts: Hosts) -> HostSaving:
        """``saving`` under the name that this host has for its folder."""
        return cls(**{**vars(saving), "path": here(saving.path), "hosts": hosts})

    def write(self, ranks: Ranks) -> None:
        with self._staged(ranks) as staging:
            owners = ranks.finish(lambda: self._write_here(staging), lambda written: self._describe(staging, written))
            ranks.finish(lambda: self._fetch_all(staging, owners), lambda _: None)
            # Nobody fetches from the hidden directory any more.
            ranks.finish(lambda: self._name(staging), lambda _: None)
        if _is_first_here():
            forget_others(self.path, self.path.parent)

    def _size(self) -> int:
        hosts = len(self.hosts.folders)
        return self.planned.total * min(hosts, 2) // hosts

    def _write_here(self, staging: Path) -> dict[str, Any]:
        staging.mkdir(parents=True, exist_ok=True)
        return {**self._write_own(staging), "host": self.hosts.here}

    def _describe(self, staging: Path, written: list[dict[str, Any]]) -> dict[str, int]:
        """Whose each file is."""
        self._complete(staging, written)
        return {name: own["host"] for own in written for name in own["files"]}

    def _fetch_all(self, staging: Path, owners: dict[str, int]) -> None:
        """What this host has to have beside its own files."""
        if not _is_first_here():
            return
        for name in SMALL if self.hosts.here else ():
            self._fetch(staging, 0, name)
        manifest = Manifest.alone(staging)
        before = self.hosts.before
        for name in (name for name, owner in owners.items() if owner == before != self.hosts.here):
            self._fetch(staging, before, name)
            manifest.check_file(staging / name)

    def _name(self, staging: Path) -> None:
        if _is_first_here():
            directory.commit(staging, self.path)

    def _fetch(self, staging: Path, host: int, name: str) -> None:
        self.hosts.fetch(host, staging.name, name, staging / name)


def forget_others(kept: Path | None, folder: Path) -> None:
    """Remove all checkpoints in ``folder`` but ``kept``."""
    for other in folder.glob("*.ckpt"):
        if other != kept:
            directory.remove(other)


def _is_first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
