"""A save in its steps: plan, copy, write, commit. The last two may run beside training.

:meth:`Saver.begin` needs the tensors and the process group; :meth:`Saving.write` needs neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lightning_bharat.checkpoints import directory, safetensors_file
from lightning_bharat.checkpoints.document import as_plain, state_bytes, take_shares, write_state
from lightning_bharat.checkpoints.errors import disk_errors, on_all_ranks, on_rank_zero, together
from lightning_bharat.checkpoints.index import write_index
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.planned import Planned, Planner
from lightning_bharat.checkpoints.snapshot import HostMemory, Later, Snapshot

T = TypeVar("T")


class Ranks(Protocol):
    """How ranks come to know of one another that they are ready."""

    def finish(self, own: Callable[[], T], last: Callable[[list[T]], None]) -> None:
        """Run ``own`` on every rank, then ``last`` on rank 0, with what ``own`` returned (plain data) on all.

        Raises:
            CheckpointError: on every rank with the same words, where one of them failed.
        """


class InGroup:
    """By the process group: all ranks wait in it."""

    def finish(self, own: Callable[[], T], last: Callable[[list[T]], None]) -> None:
        everyone = on_all_ranks(together(own))
        on_rank_zero(lambda: last(everyone))


class Saver:
    """Saves checkpoints, one after another, and keeps what the next one can use: the plan, and host memory."""

    def __init__(self) -> None:
        self._planner, self._memory = Planner(), HostMemory()

    def save(self, path: Path, checkpoint: dict[str, Any], manifest: Manifest) -> None:
        """Write ``checkpoint`` to ``path``, which appears when it is whole. All ranks must call it.

        Raises:
            CheckpointError: on every rank, with the first reason; ``path`` is then as it was before.
        """
        self.begin(path, checkpoint, manifest).write(InGroup())

    def begin(
        self,
        path: Path,
        checkpoint: dict[str, Any],
        manifest: Manifest,
        copy: bool = False,
        later: Later = lambda tensor: None,
    ) -> Saving:
        """All that comes before :meth:`Saving.write`. All ranks must call it.

        Args:
            copy: take the values that tensors have now; else :meth:`Saving.write` reads them. The copy of an earlier
                save is overwritten, so that one must be through.
            later: of which tensors :meth:`Saving.write` may make the copy (:meth:`HostMemory.copy`).

        Raises:
            CheckpointError: on every rank, with the first reason.
            WriteError: likewise, where it is the disk's: too little space, for instance.
        """
        tree, shares = take_shares(checkpoint)
        tree = together(lambda: as_plain(tree))
        planned = self._planner.plan(shares)
        entries = planned.entries(shares)
        snapshot = together(lambda: self._memory.copy(entries, later)) if copy else Snapshot(entries)
        state: list[bytes] = []  # of rank 0, and not to be sent

        def stage() -> Path:
            state.append(state_bytes(tree))
            directory.need_space(path, planned.total + len(state[0]))
            return directory.stage(path)

        with disk_errors():
            staging = on_rank_zero(stage)
        return Saving(path, staging, planned, snapshot, b"".join(state), manifest)


@dataclass(frozen=True)
class Saving:
    """A save that has begun: the hidden directory ``staging`` is there, and becomes ``path``.

    Attributes:
        planned: who writes what.
        snapshot: what this rank writes.
        state: content of `state.pt`, on rank 0.
    """

    path: Path
    staging: Path
    planned: Planned
    snapshot: Snapshot
    state: bytes
    manifest: Manifest

    def write(self, ranks: Ranks) -> None:
        """Write this rank's file; when all ranks have, rank 0 writes the rest and commits. All ranks must call it.

        Raises:
            WriteError: on every rank, with the first reason; ``path`` is then as it was before.
        """
        try:
            with disk_errors():
                ranks.finish(self._write_own, self._commit)
        except BaseException:
            shutil.rmtree(self.staging, ignore_errors=True)
            raise

    def _write_own(self) -> dict[str, str]:
        """Digests by the names of the files that this rank wrote."""
        self.snapshot.complete()
        if not self.snapshot.entries:
            return {}
        name = self.planned.file
        return {name: safetensors_file.write(self.staging / name, self.snapshot.entries, {"format": "pt"})}

    def _commit(self, written: list[dict[str, str]]) -> None:
        planned = self.planned
        assert planned.metadata is not None
        write_index(self.staging, planned.metadata, planned.files)
        write_state(self.staging, self.state)
        digests = {name: digest for of_rank in written for name, digest in of_rank.items()}
        self.manifest.write(self.staging, digests)
        directory.commit(self.staging, self.path)
