"""The launcher's part of checkpoints in hosts' memory: their files outlive ranks, and are served to other hosts."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shutil
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import torch.distributed as dist
import xxhash

from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.file_server import FileServer
from lightning_bharat.checkpoints.host_memory import ELSEWHERE, PART, Hosts
from lightning_bharat.checkpoints.host_saving import SMALL, forget_others
from lightning_bharat.checkpoints.lock import FolderLock
from lightning_bharat.checkpoints.manifest import Manifest

# Where memory is a folder; in it each run makes one that no other user may read.
PLACE_VARIABLE, PLACE = "BHARAT_HOST_MEMORY_PLACE", "/dev/shm"
_LAUNCHERS = 64  # of one run on one machine


class LaunchMemory:
    """A folder in this host's memory for the checkpoints of one run.

    Args:
        run: what names the run, the same when it is started again.
    """

    def __init__(self, run: Sequence[str]) -> None:
        name = f"bharat-{getpass.getuser()}-{xxhash.xxh3_64_hexdigest(json.dumps(list(run)).encode())}"
        self.folder, self._lock = _taken(_place() / name)
        self._server: FileServer | None = None

    def meet(self, store: dist.Store, rank: int, size: int, address: str) -> Hosts:
        """Tell the other hosts of an attempt what is here, and agree on the checkpoint to go on from, if there is one.

        All hosts must call it; ranks are not running.

        Args:
            store: of the attempt.
            rank, size: of this host, and how many there are.
            address: of this host, where the others reach it.
        """
        self.stop_serving()
        for part in self.folder.glob(f".*{PART}"):
            part.unlink(missing_ok=True)
        directory.forget_leavings(self.folder)
        if rank == 0:
            store.set("memory/token", secrets.token_hex(16))
        token = store.get("memory/token").decode()
        if size > 1:
            self._server = FileServer(self.folder, address, token)
        mine = {"folder": str(self.folder), "address": self._server.address if self._server else ""}
        store.set(f"memory/{rank}", json.dumps({**mine, "there": _there(self.folder)}))
        said = [json.loads(store.get(f"memory/{host}")) for host in range(size)]
        hosts = Hosts(rank, tuple(s["folder"] for s in said), tuple(s["address"] for s in said), token)
        there = [s["there"] for s in said]
        newest, error = newest_of_all(there), ""
        (self.folder / ELSEWHERE).unlink(missing_ok=True)
        if newest is None:
            return hosts
        try:
            self._assemble(hosts, there, newest)
        except (CheckpointError, OSError) as raised:
            error = str(raised)
        store.set(f"memory/done/{rank}", error)
        errors = [store.get(f"memory/done/{host}").decode() for host in range(size)]
        # As one: a checkpoint that one host lacks is none.
        forget_others(self.folder / newest.name if not any(errors) else None, self.folder)
        return hosts

    def _assemble(self, hosts: Hosts, there: Sequence[Mapping[str, Any]], newest: Newest) -> None:
        """Bring a checkpoint of which all files are on some host to this one: what every host has of it, and a list of
        who has the rest."""
        name = newest.name
        owners = {
            host: found[name]["files"]
            for host, found in enumerate(there)
            if name in found and found[name]["id"] == newest.id
        }
        if hosts.here not in owners:
            with directory.own_directory(self.folder / name) as staging:
                for file in SMALL:
                    hosts.fetch(min(owners), name, file, staging / file)
        files = {file for had in owners.values() for file in had}
        having = {file: [host for host, had in owners.items() if file in had] for file in sorted(files)}
        (self.folder / ELSEWHERE).write_text(json.dumps({name: having}))

    def stop_serving(self) -> None:
        """Ranks are about to end."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self, keep: bool) -> Path | None:
        """Serve no more, and give the memory back; or ``keep`` what is there, for a new start of the run.

        Returns:
            The folder, if something was kept.
        """
        self.stop_serving()
        keep = keep and any(self.folder.glob("*.ckpt"))
        self._lock.release()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.folder if keep else None


class Newest(NamedTuple):
    """A checkpoint."""

    step: int
    id: str
    name: str


def newest_of_all(there: Sequence[Mapping[str, Any]]) -> Newest | None:
    """Of what hosts have the checkpoint of the last step that has all of its files.

    Args:
        there: of each host, by names of checkpoints: ``id``, ``step``, the names of all files that belong to it as
            ``needs`` and of those that are there as ``files``.
    """
    found: defaultdict[Newest, set[str]] = defaultdict(set)
    needs: defaultdict[Newest, set[str]] = defaultdict(set)
    for host in there:
        for name, one in host.items():
            key = Newest(one["step"], one["id"], name)
            found[key].update(one["files"])
            needs[key].update(one["needs"])
    return max((key for key in found if needs[key] <= found[key]), default=None)


def reachable_address(address: str, port: int) -> str:
    """Of this host, as a host at ``address`` sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        return probe.getsockname()[0]


def _there(folder: Path) -> dict[str, Any]:
    found = {}
    for path in folder.glob("*.ckpt"):
        with suppress(CheckpointError):
            manifest = Manifest.alone(path)
            sizes = {name: said["bytes"] for name, said in manifest.files.items()}
            files = [name for name, size in sizes.items() if _size(path / name) == size]
            found[path.name] = {"id": manifest.id, "step": manifest.step, "needs": list(sizes), "files": files}
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _place() -> Path:
    """In memory, or in a folder that was named; where the system has no such memory, among temporary files."""
    there = PLACE if os.access(PLACE, os.W_OK) else gettempdir()
    return Path(os.environ.get(PLACE_VARIABLE) or there)


def _taken(folder: Path) -> tuple[Path, FolderLock]:
    """``folder``, or one beside it where another launcher on this machine has that."""
    for number in range(_LAUNCHERS):
        path = folder.with_name(f"{folder.name}-{number}")
        path.mkdir(mode=0o700, exist_ok=True)
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            raise CheckpointError(f"{path} belongs to another user; set {PLACE_VARIABLE} to a folder of your own")
        lock = FolderLock(path)
        with suppress(CheckpointError):
            lock.take()
            return path, lock
    raise CheckpointError(f"{folder}-0 to -{_LAUNCHERS - 1} are in use by other launchers")
