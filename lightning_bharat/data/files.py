"""Whole files for each data rank, in one order on every number of ranks."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash

from lightning_bharat.data.counts import Counts, checked
from lightning_bharat.data.errors import DataError
from lightning_bharat.data.order import GlobalOrder, OrderedBatches

LANES = 8


class FileOrder:
    """A permutation of the samples of files for each epoch, which reads ``lanes`` files side by side, each to its end.

    A file belongs to one lane in all epochs; the lanes take turns. Files come in another order in each epoch, and so do
    the samples in a file. When the shortest lane ends, what the others have left comes one file after another.
    Files are dealt from the largest on, each to the lane that has least (Graham, "Bounds on multiprocessing timing
    anomalies", 1969: no lane has more than 4/3 of the best there is). Memory grows with the number of files alone.

    Args:
        sizes: samples in each file; the samples are numbered file after file.
        lanes: at most as many as files with samples.
        seed: of the order.
        shuffle: as above, or files and samples as they are stored.
    """

    def __init__(self, sizes: np.ndarray, lanes: int, seed: int = 0, shuffle: bool = True) -> None:
        self.seed, self.shuffle, self.lanes = seed, shuffle, lanes
        self._sizes = sizes
        self._firsts = np.cumsum(sizes) - sizes
        self.files = _dealt(sizes, lanes)
        self._rows = np.array([sizes[files].sum() for files in self.files])
        self.together = int(self._rows.min()) * lanes  # positions up to the end of the shortest lane
        self._ends_left = np.cumsum(self._rows - self._rows.min())
        self._arranged: tuple[int, list[np.ndarray]] | None = None

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Which samples stand at these positions of an epoch: int64, of the same shape (n,)."""
        lanes, rows = positions % self.lanes, positions // self.lanes
        behind = positions >= self.together
        left = positions[behind] - self.together
        lanes[behind] = np.searchsorted(self._ends_left, left, side="right")
        before = (self._ends_left - self._rows + self._rows.min())[lanes[behind]]
        rows[behind] = self._rows.min() + left - before
        found = np.empty(len(positions), dtype=np.int64)
        for lane in np.unique(lanes):
            mine = lanes == lane
            found[mine] = self._of_lane(epoch, lane, rows[mine])
        return found

    def _of_lane(self, epoch: int, lane: int, rows: np.ndarray) -> np.ndarray:
        files = self._files_of(epoch)[lane]
        ends = np.cumsum(self._sizes[files])
        which = np.searchsorted(ends, rows, side="right")
        found = np.empty(len(rows), dtype=np.int64)
        for number in np.unique(which):
            file, mine = files[number], which == number
            size = int(self._sizes[file])
            order = GlobalOrder(size, self._seed_of(int(file)), self.shuffle)
            found[mine] = self._firsts[file] + order.at(epoch, rows[mine] - (ends[number] - size))
        return found

    def _files_of(self, epoch: int) -> list[np.ndarray]:
        """The files of each lane in the order of an epoch."""
        if self._arranged is None or self._arranged[0] != epoch:
            orders = (GlobalOrder(len(files), self.seed, self.shuffle)(epoch, 0, len(files)) for files in self.files)
            self._arranged = epoch, [files[order] for files, order in zip(self.files, orders, strict=True)]
        return self._arranged[1]

    def _seed_of(self, file: int) -> int:
        return (self.seed << 32) + file + 1


def _dealt(sizes: np.ndarray, lanes: int) -> list[np.ndarray]:
    least = [(0, lane) for lane in range(lanes)]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    for file in np.argsort(-sizes, kind="stable"):
        if sizes[file]:
            rows, lane = heapq.heappop(least)
            dealt[lane].append(int(file))
            heapq.heappush(least, (rows + int(sizes[file]), lane))
    return [np.sort(np.array(files)) for files in dealt]


class FileBatches(OrderedBatches):
    """By file: each data rank reads files of its own, the same in every epoch, each from its beginning to its end.

    Files are dealt to lanes (:class:`FileOrder`), and lanes to data ranks, so that the order depends on the seed, the
    epoch and the lanes alone. There are 8 lanes (of fewer files 4, 2 or 1), so it is the same order on 1, 2, 4 and 8
    data ranks; on other numbers there is a lane for each. A run that goes on keeps the lanes that it was begun with:
    on a number of data ranks that does not divide them, ranks read one another's files, too. (MosaicML's streaming
    keeps its canonical nodes in that way.)

    What longer lanes have left when the shortest ends is shared by all data ranks, so that all have the same number of
    steps and no sample is lost: there ranks read files of others. :attr:`own_share` says how much comes before.

    Args:
        sizes: samples in each file; the samples are numbered file after file.
        batch_size: samples a step of one data rank.
        num_replicas: number of data ranks.
        rank: which of them this is.
        seed: of the order.
        shuffle: files, and samples in them, in another order in each epoch; or as they are stored.
        drop_last: see :class:`~lightning_bharat.data.Steps`.

    Raises:
        DataError: fewer files with samples than data ranks, or fewer samples than one step takes.
    """

    def __init__(
        self,
        sizes: Counts,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        self._sizes = checked("sizes", sizes, "file", least=0)
        files = int((self._sizes > 0).sum())
        if files < num_replicas:
            raise DataError(
                f"{files} files with samples are fewer than {num_replicas} data ranks, of which each reads files of "
                f"its own; run on at most {files} data ranks, write the data into more files, or share samples by rank"
            )
        lanes = min(LANES, 1 << (files.bit_length() - 1))
        self.files = FileOrder(self._sizes, num_replicas if lanes % num_replicas else lanes, seed, shuffle)
        share = {"num_replicas": num_replicas, "rank": rank}
        super().__init__(int(self._sizes.sum()), batch_size, **share, seed=seed, shuffle=shuffle, drop_last=drop_last)

    @property
    def own_share(self) -> float:
        """Of the samples, those that come while each data rank reads files of its own."""
        return self.files.together / self.length

    def state_dict(self, done: int = 0) -> dict[str, Any]:
        sizes = xxhash.xxh3_64_hexdigest(self._sizes.data)
        return {**super().state_dict(done), "sharding": "file", "sizes": sizes, "lanes": self.files.lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.files = FileOrder(self._sizes, state["lanes"], self.files.seed, self.files.shuffle)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, steps, files = self.epoch, self._steps(self.position), self.files
        for step in range(len(steps)):
            # Lanes take turns, and so do ranks: where these divide those, a rank stays with its lanes.
            places = np.arange(steps.end(step - 1) + self.rank, steps.end(step), self.num_replicas)
            yield files.at(epoch, places).tolist()
