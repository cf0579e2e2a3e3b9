"""A save in its steps: plan, copy, write, commit. The last two may run beside training.

:meth:`Saver.begin` needs the tensors and the process group; :meth:`Saving.write` needs neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lightning_bharat.checkpoints import compressed_file, directory, safetensors_file
from lightning_bharat.checkpoints.compressed_file import Place
from lightning_bharat.checkpoints.digest import DIGEST, read_back
from lightning_bharat.checkpoints.document import as_plain, state_bytes, take_shares, write_state
from lightning_bharat.checkpoints.errors import disk_errors, highest_of_all, on_all_ranks, on_rank_zero, together
from lightning_bharat.checkpoints.frozen import FrozenFiles, name_of
from lightning_bharat.checkpoints.host_memory import here
from lightning_bharat.checkpoints.index import Stored, chunk_key, write_index
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.planned import Planned, Planner
from lightning_bharat.checkpoints.snapshot import HostMemory, Later, Snapshot
from lightning_bharat.checkpoints.told import Told, apart, as_text, from_text, own_of, with_all

T = TypeVar("T")
U = TypeVar("U")
Highest: TypeAlias = Callable[[Sequence[int]], list[int]]
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
        highest: Highest = highest_of_all,
    ) -> Saving:
        """All that comes before :meth:`Saving.write`. All ranks must call it, and meet in one small exchange, where the
        plan of the last save holds.

        Args:
            path: rank 0's counts.
            copy: take the values that tensors have now; else :meth:`Saving.write` reads them. The copy of an earlier
                save is overwritten, so that one must be through.
            later: of which tensors :meth:`Saving.write` may make the copy (:meth:`HostMemory.copy`).
            highest: the exchange, as :func:`~lightning_bharat.checkpoints.errors.highest_of_all`.

        Raises:
            CheckpointError: on every rank, with the first reason.
        """

        def taken(planned: Planned) -> Snapshot:
            entries = planned.entries(shares)
            return self._memory.copy(entries, later) if copy else Snapshot(entries)

        planned, error = None, None
        try:
            rest, told = apart(checkpoint)
            tree, shares = take_shares(rest)
            tree, own = as_plain(tree, copy=copy), own_of(told)
            planned = self._planner.known(shares)
            snapshot = taken(planned) if planned else None
        except Exception as raised:
            error = raised
        failed, unknown = highest([error is not None, planned is None])
        if failed:
            together(lambda: _raise(error))
        if unknown or planned is None or snapshot is None:
            planned = self._planner.plan(shares)
            snapshot = together(lambda: taken(planned))
        how = self.frozen, self.compression, self.read_back
        return Saving(path, planned, snapshot, tree, told, own, manifest, *how)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


@dataclass(frozen=True)
class Saving:
    """A save that has begun, of which nothing is on the disk yet.

    Attributes:
        path: where it goes; rank 0's counts.
        planned: who writes what.
        snapshot: what this rank writes.
        tree: what stands in `state.pt`, on rank 0, without what all ranks tell.
        told: what they tell, and ``own``, this rank's.
        frozen: of this rank, for this save and those before and after.
    """

    path: Path
    planned: Planned
    snapshot: Snapshot
    tree: dict[str, Any]
    told: dict[str, Told]
    own: dict[str, Any]
    manifest: Manifest
    frozen: FrozenFiles
    compression: Compression | None = None
    read_back: bool = False

    def write(self, ranks: Ranks) -> None:
        """Make a hidden directory beside ``path``, and write this rank's file to it; when all ranks have, rank 0 writes
        the rest and commits. All ranks must call it.

        Raises:
            WriteError: on every rank, with the first reason; ``path`` is then as it was before.
        """
        with self._staged(ranks) as staging:
            ranks.finish(lambda: self._write_own(staging), lambda written: self._commit(staging, written))
            self.frozen.parent = self.path

    @contextmanager
    def _staged(self, ranks: Ranks) -> Iterator[Path]:
        """The hidden directory that rank 0 has made for all of them; it is removed where the block raises."""
        error, staging = self._copied(), None
        try:
            with disk_errors():
                staging = here(Path(ranks.finish(lambda: _raise(error), lambda _: self._stage())))
                yield staging
        except BaseException:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _copied(self) -> Exception | None:
        """Complete the copy before anything is waited for: a step may wait for it. Returns what went wrong."""
        try:
            self.snapshot.complete()
        except Exception as error:
            return error
        return None

    def _stage(self) -> str:
        directory.need_space(self.path, self._size() + len(state_bytes(self.tree)))
        return str(directory.stage(self.path))

    def _size(self) -> int:
        """Bytes of tensors that are written beside rank 0's path."""
        return self.planned.total - self.frozen.spared(self.path)

    def _write_own(self, staging: Path) -> dict[str, Any]:
        """What this rank has written: sizes and digests of its files, which tensors are in that of the frozen ones, and
        where tensors are in their file if that is not told by itself; and what it tells."""
        written: dict[str, str] = {}
        places: dict[str, Place] = {}
        frozen = [entry for entry in self.snapshot.entries if entry.frozen]
        if rest := [entry for entry in self.snapshot.entries if not entry.frozen]:
            name = self._named(self.planned.file)
            if self.compression is None:
                written[name] = safetensors_file.write(staging / name, rest, {"format": "pt"})
            else:
                written[name], places = compressed_file.write(staging / name, rest)
        if frozen:
            name = self._named(name_of(self.planned.file))
            written[name], its = self.frozen.write(staging / name, frozen)
            places |= its
        if self.read_back:
            for name, digest in written.items():
                read_back(staging / name, digest)
        return {
            "file": self.planned.file,
            "files": {
                name: {"bytes": (staging / name).stat().st_size, DIGEST: digest} for name, digest in written.items()
            },
            "frozen": [entry.key for entry in frozen],
            "places": {key: (place.begin, place.pieces) for key, place in places.items()},
            "told": as_text(self.own) if self.told else "",
        }

    def _named(self, file: str) -> str:
        return file if self.compression is None else str(Path(file).with_suffix(compressed_file.SUFFIX))

    def _commit(self, staging: Path, written: list[dict[str, Any]]) -> None:
        self._complete(staging, written)
        directory.commit(staging, self.path)

    def _complete(self, staging: Path, written: list[dict[str, Any]]) -> None:
        """Write what is not of one rank."""
        planned = self.planned
        assert planned.metadata is not None
        done = {own["file"]: {**own, "frozen": set(own["frozen"])} for own in written}
        tree = with_all(self.tree, self.told, [from_text(own["told"]) for own in written]) if self.told else self.tree
        write_index(staging, planned.metadata, dict(self._stored(planned.metadata, done)))
        write_state(staging, state_bytes(tree))
        self.manifest.write(staging, {name: said for own in written for name, said in own["files"].items()})

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
