"""A save in its steps: plan, copy, write, commit. The last two may run beside training.

:meth:`Saver.begin` needs the tensors and the process group; :meth:`Saving.write` needs neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lightning_bharat.checkpoints import compressed_file, directory, safetensors_file
from lightning_bharat.checkpoints.compressed_file import Place
from lightning_bharat.checkpoints.digest import DIGEST, read_back
from lightning_bharat.checkpoints.document import as_plain, state_bytes, take_shares, write_state
from lightning_bharat.checkpoints.errors import disk_errors, on_all_ranks, on_rank_zero, together
from lightning_bharat.checkpoints.frozen import FrozenFiles, name_of
from lightning_bharat.checkpoints.index import Stored, chunk_key, write_index
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.planned import Planned, Planner
from lightning_bharat.checkpoints.snapshot import HostMemory, Later, Snapshot

T = TypeVar("T")
U = TypeVar("U")
Compression: TypeAlias = Literal["zstd"]


class Ranks(Protocol):
    """How ranks come to know of one another that they are ready."""

    def finish(self, own: Callable[[], T], last: Callable[[list[T]], U]) -> U:
        """Run ``own`` on every rank, then ``last`` on rank 0, with what ``own`` returned (plain data) on all.

        Returns:
            What ``last`` returned (plain data), on every rank.

        Raises:
            CheckpointError: on every rank with the same words, where one of them failed.
        """


class InGroup:
    """By the process group: all ranks wait in it."""

    def finish(self, own: Callable[[], T], last: Callable[[list[T]], U]) -> U:
        everyone = on_all_ranks(together(own))
        return on_rank_zero(lambda: last(everyone))


class Saver:
    """Saves checkpoints, one after another, and keeps what the next one can use: the plan, and host memory.

    Args:
        compression: of tensors; ``None`` leaves them as any safetensors reader opens them.
        read_back: read each rank's file from the disk again before the checkpoint is committed, and compare it.
    """

    def __init__(self, compression: Compression | None = None, read_back: bool = False) -> None:
        self._planner, self._memory, self.frozen = Planner(), HostMemory(), FrozenFiles()
        self.compression, self.read_back = compression, read_back

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
            directory.need_space(path, planned.total + len(state[0]) - self.frozen.spared(path))
            return directory.stage(path)

        with disk_errors():
            staging = on_rank_zero(stage)
        how = self.frozen, self.compression, self.read_back
        return Saving(path, staging, planned, snapshot, b"".join(state), manifest, *how)


@dataclass(frozen=True)
class Saving:
    """A save that has begun: the hidden directory ``staging`` is there, and becomes ``path``.

    Attributes:
        planned: who writes what.
        snapshot: what this rank writes.
        state: content of `state.pt`, on rank 0.
        frozen: of this rank, for this save and those before and after.
    """

    path: Path
    staging: Path
    planned: Planned
    snapshot: Snapshot
    state: bytes
    manifest: Manifest
    frozen: FrozenFiles
    compression: Compression | None = None
    read_back: bool = False

    def write(self, ranks: Ranks) -> None:
        """Write this rank's file; when all ranks have, rank 0 writes the rest and commits. All ranks must call it.

        Raises:
            WriteError: on every rank, with the first reason; ``path`` is then as it was before.
        """
        try:
            with disk_errors():
                ranks.finish(self._write_own, self._commit)
            self.frozen.parent = self.path
        except BaseException:
            shutil.rmtree(self.staging, ignore_errors=True)
            raise

    def _write_own(self) -> dict[str, Any]:
        """What this rank has written: sizes and digests of its files, which tensors are in that of the frozen ones, and
        where tensors are in their file if that is not told by itself."""
        self.snapshot.complete()
        written: dict[str, str] = {}
        places: dict[str, Place] = {}
        frozen = [entry for entry in self.snapshot.entries if entry.frozen]
        if rest := [entry for entry in self.snapshot.entries if not entry.frozen]:
            name = self._named(self.planned.file)
            if self.compression is None:
                written[name] = safetensors_file.write(self.staging / name, rest, {"format": "pt"})
            else:
                written[name], places = compressed_file.write(self.staging / name, rest)
        if frozen:
            name = self._named(name_of(self.planned.file))
            written[name], its = self.frozen.write(self.staging / name, frozen)
            places |= its
        if self.read_back:
            for name, digest in written.items():
                read_back(self.staging / name, digest)
        return {
            "file": self.planned.file,
            "files": {
                name: {"bytes": (self.staging / name).stat().st_size, DIGEST: digest}
                for name, digest in written.items()
            },
            "frozen": [entry.key for entry in frozen],
            "places": {key: (place.begin, place.pieces) for key, place in places.items()},
        }

    def _named(self, file: str) -> str:
        return file if self.compression is None else str(Path(file).with_suffix(compressed_file.SUFFIX))

    def _commit(self, written: list[dict[str, Any]]) -> None:
        self._complete(written)
        directory.commit(self.staging, self.path)

    def _complete(self, written: list[dict[str, Any]]) -> None:
        """Write what is not of one rank."""
        planned = self.planned
        assert planned.metadata is not None
        done = {own["file"]: {**own, "frozen": set(own["frozen"])} for own in written}
        write_index(self.staging, planned.metadata, dict(self._stored(planned.metadata, done)))
        write_state(self.staging, self.state)
        self.manifest.write(self.staging, {name: said for own in written for name, said in own["files"].items()})

    def _stored(self, metadata: Metadata, done: Mapping[str, Any]) -> Iterator[tuple[MetadataIndex, Stored]]:
        """Where each rectangle is."""
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks:
                index = MetadataIndex(name, chunk.offsets)
                file, key = self.planned.files[index], chunk_key(name, entry.size, chunk)
                own = done[file]
                place = own["places"].get(key)
                named = self._named(name_of(file) if key in own["frozen"] else file)
                yield index, Stored(named, Place(place[0], tuple(place[1])) if place else None)
